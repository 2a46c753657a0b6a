//! One communicator as its server sees it: calls come in, matched results go out. No input or output here.

use crate::dtype::{DType, Reduction, reduce};
use crate::error::{Code, Error, Result};
use crate::wire::{Call, Hello, Kind, Reply};
use std::collections::{BTreeMap, HashMap, VecDeque};

/// What goes to a rank.
pub type Mail = (usize, Reply, Vec<u8>);

struct Posted {
    id: u64,
    call: Call,
    bytes: Vec<u8>,
}

struct Message {
    id: u64,
    count: u64,
    dtype: i32,
    bytes: Vec<u8>,
}

#[derive(Default)]
struct Pair {
    sends: VecDeque<Message>,
    receives: VecDeque<Message>,
}

pub struct Room {
    ranks: usize,
    members: Vec<Option<Hello>>,
    gone: Vec<bool>,
    ready: bool,
    collectives: Vec<VecDeque<Posted>>,
    splits: Vec<VecDeque<(u64, i32, i32)>>,
    /// By sender and receiver.
    pairs: HashMap<(usize, usize), Pair>,
    /// Once ranks disagreed nothing works any more.
    broken: Option<Error>,
    /// Whether operations that need a rank which left fail.
    fail_on_loss: bool,
}

fn failed(rank: usize, id: u64, error: &Error) -> Mail {
    (rank, Reply::Failed { id, error: error.clone() }, Vec::new())
}

impl Room {
    pub fn new(ranks: usize, fail_on_loss: bool) -> Self {
        Self {
            ranks,
            members: (0..ranks).map(|_| None).collect(),
            gone: vec![false; ranks],
            ready: false,
            collectives: (0..ranks).map(|_| VecDeque::new()).collect(),
            splits: (0..ranks).map(|_| VecDeque::new()).collect(),
            pairs: HashMap::new(),
            broken: None,
            fail_on_loss,
        }
    }

    /// A rank joins. All hear of it when the last one is there, or when they do not fit together.
    pub fn join(&mut self, hello: Hello) -> Result<Vec<Mail>> {
        let usage = |text: String| Error::new(Code::INVALID_USAGE, text);
        if hello.ranks != self.ranks {
            return Err(usage(format!(
                "rank {} says {} ranks, others {}",
                hello.rank, hello.ranks, self.ranks
            )));
        }
        let rank = hello.rank;
        let place = self.members.get_mut(rank).ok_or_else(|| usage(format!("no rank {rank}")))?;
        if place.is_some() {
            return Err(usage(format!("two ranks say they are rank {rank}")));
        }
        *place = Some(hello);
        let members: Vec<&Hello> = self.members.iter().flatten().collect();
        if members.len() < self.ranks {
            return Ok(Vec::new());
        }
        let reply = match misfit(&members) {
            Some(text) => {
                let error = usage(text);
                self.broken = Some(error.clone());
                Reply::Refused(error)
            }
            None => {
                self.ready = true;
                Reply::Ready
            }
        };
        Ok((0..self.ranks).map(|rank| (rank, reply.clone(), Vec::new())).collect())
    }

    /// Somebody who cannot join asked to: nobody can be served then.
    pub fn refuse(&mut self, error: &Error) -> Vec<Mail> {
        self.broken = Some(error.clone());
        let joined = (0..self.ranks).filter(|rank| self.members[*rank].is_some() && !self.gone[*rank]);
        let mut mail: Vec<Mail> = if self.ready {
            Vec::new()
        } else {
            joined.map(|rank| (rank, Reply::Refused(error.clone()), Vec::new())).collect()
        };
        mail.extend(self.progress());
        mail
    }

    pub fn collective(&mut self, rank: usize, id: u64, call: Call, bytes: Vec<u8>) -> Vec<Mail> {
        self.collectives[rank].push_back(Posted { id, call, bytes });
        self.progress()
    }

    pub fn send(&mut self, from: usize, id: u64, to: usize, what: (u64, i32), bytes: Vec<u8>) -> Vec<Mail> {
        let message = Message { id, count: what.0, dtype: what.1, bytes };
        self.pairs.entry((from, to)).or_default().sends.push_back(message);
        self.progress()
    }

    pub fn receive(&mut self, to: usize, id: u64, from: usize, what: (u64, i32)) -> Vec<Mail> {
        let message = Message { id, count: what.0, dtype: what.1, bytes: Vec::new() };
        self.pairs.entry((from, to)).or_default().receives.push_back(message);
        self.progress()
    }

    /// `open` makes a room of so many ranks and gives its number.
    pub fn split(
        &mut self,
        rank: usize,
        id: u64,
        (color, key): (i32, i32),
        open: impl FnMut(usize) -> u64,
    ) -> Vec<Mail> {
        self.splits[rank].push_back((id, color, key));
        let mut mail = self.try_split(open);
        mail.extend(self.progress());
        mail
    }

    /// A rank has left.
    pub fn leave(&mut self, rank: usize) -> Vec<Mail> {
        self.gone[rank] = true;
        if !self.ready {
            let error = Error::new(Code::REMOTE, format!("rank {rank} left before all had joined"));
            let waiting = (0..self.ranks).filter(|r| self.members[*r].is_some() && !self.gone[*r]);
            return waiting.map(|r| (r, Reply::Refused(error.clone()), Vec::new())).collect();
        }
        self.progress()
    }

    fn try_split(&mut self, mut open: impl FnMut(usize) -> u64) -> Vec<Mail> {
        let mut mail = Vec::new();
        while self.splits.iter().all(|queue| !queue.is_empty()) {
            let asked: Vec<_> = self.splits.iter_mut().filter_map(VecDeque::pop_front).collect();
            let mut colors: BTreeMap<i32, Vec<(i32, usize)>> = BTreeMap::new();
            for (rank, (_, color, key)) in asked.iter().enumerate() {
                colors.entry(*color).or_default().push((*key, rank));
            }
            for (color, mut members) in colors {
                members.sort_unstable();
                // Without a color there is no communicator, and room 0 stands for none.
                let room = if color >= 0 { open(members.len()) } else { 0 };
                for (new, (_, old)) in members.iter().enumerate() {
                    let reply = Reply::Split { id: asked[*old].0, room, rank: new, ranks: members.len() };
                    mail.push((*old, reply, Vec::new()));
                }
            }
        }
        mail
    }

    fn progress(&mut self) -> Vec<Mail> {
        let mut mail = Vec::new();
        while self.broken.is_none() && self.collectives.iter().all(|queue| !queue.is_empty()) {
            let posted: Vec<_> = self.collectives.iter_mut().filter_map(VecDeque::pop_front).collect();
            match finish(&posted) {
                Ok(results) => mail.extend(
                    posted
                        .iter()
                        .zip(results)
                        .enumerate()
                        .map(|(rank, (posted, bytes))| (rank, Reply::Done { id: posted.id }, bytes)),
                ),
                Err(error) => {
                    mail.extend(posted.iter().enumerate().map(|(rank, p)| failed(rank, p.id, &error)));
                    self.broken = Some(error);
                }
            }
        }
        self.progress_pairs(&mut mail);
        self.fail_hopeless(&mut mail);
        mail
    }

    fn progress_pairs(&mut self, mail: &mut Vec<Mail>) {
        for ((from, to), pair) in &mut self.pairs {
            while self.broken.is_none() && !pair.sends.is_empty() && !pair.receives.is_empty() {
                let (Some(sent), Some(wanted)) = (pair.sends.pop_front(), pair.receives.pop_front()) else {
                    return;
                };
                if (sent.count, sent.dtype) == (wanted.count, wanted.dtype) {
                    mail.push((*to, Reply::Done { id: wanted.id }, sent.bytes));
                    mail.push((*from, Reply::Done { id: sent.id }, Vec::new()));
                } else {
                    let error = Error::new(
                        Code::INVALID_USAGE,
                        format!(
                            "rank {from} sends {} elements of type {}, rank {to} wants {} of type {}",
                            sent.count, sent.dtype, wanted.count, wanted.dtype
                        ),
                    );
                    mail.push(failed(*to, wanted.id, &error));
                    mail.push(failed(*from, sent.id, &error));
                    self.broken = Some(error);
                }
            }
        }
    }

    /// What can never be done any more fails: all if ranks disagreed, else what needs a rank that left.
    fn fail_hopeless(&mut self, mail: &mut Vec<Mail>) {
        let lost = |rank: usize| {
            let error = Error::new(Code::REMOTE, format!("rank {rank} has left the communicator"));
            (self.fail_on_loss && self.gone[rank]).then_some(error)
        };
        let broken = self.broken.clone();
        let missing = (0..self.ranks).find_map(|r| self.collectives[r].is_empty().then(|| lost(r)).flatten());
        if let Some(error) = broken.clone().or(missing) {
            for (rank, queue) in self.collectives.iter_mut().enumerate() {
                mail.extend(queue.drain(..).map(|posted| failed(rank, posted.id, &error)));
            }
        }
        let missing = (0..self.ranks).find_map(|r| self.splits[r].is_empty().then(|| lost(r)).flatten());
        if let Some(error) = broken.clone().or(missing) {
            for (rank, queue) in self.splits.iter_mut().enumerate() {
                mail.extend(queue.drain(..).map(|(id, ..)| failed(rank, id, &error)));
            }
        }
        for ((from, to), pair) in &mut self.pairs {
            if let Some(error) = broken.clone().or_else(|| lost(*to)) {
                mail.extend(pair.sends.drain(..).map(|sent| failed(*from, sent.id, &error)));
            }
            if let Some(error) = broken.clone().or_else(|| lost(*from)) {
                mail.extend(pair.receives.drain(..).map(|wanted| failed(*to, wanted.id, &error)));
            }
        }
    }
}

/// Why these ranks cannot make a communicator.
fn misfit(members: &[&Hello]) -> Option<String> {
    for (i, one) in members.iter().enumerate() {
        for other in &members[..i] {
            if one.version != other.version {
                return Some(format!(
                    "rank {} has NCCL {}, rank {} has {}",
                    other.rank, other.version, one.rank, one.version
                ));
            }
            if one.host == other.host && one.device == other.device && !shares_allowed() {
                return Some(format!(
                    "Duplicate GPU detected : rank {} and rank {} both on CUDA device {}",
                    one.rank, other.rank, one.device
                ));
            }
        }
    }
    None
}

/// NCCL since 2.30.
fn shares_allowed() -> bool {
    std::env::var_os("NCCL_MULTI_RANK_GPU_ENABLE").is_some_and(|value| value == "1")
        && smddp_standin::switches::Switches::get().nccl_version >= 23_000
}

/// The results of a collective, by rank.
fn finish(posted: &[Posted]) -> Result<Vec<Vec<u8>>> {
    let call = &posted[0].call;
    if let Some((rank, other)) = posted.iter().enumerate().find(|(_, posted)| posted.call != *call) {
        let text = format!("ranks disagree: rank 0 calls {call:?}, rank {rank} calls {:?}", other.call);
        return Err(Error::new(Code::INVALID_USAGE, text));
    }
    let ranks = posted.len();
    let inputs: Vec<&[u8]> = posted.iter().map(|posted| posted.bytes.as_slice()).collect();
    let dtype = DType::of(call.dtype)?;
    let reduced = || reduce(dtype, Reduction::of(call.op).unwrap_or(Reduction::Sum), &inputs);
    let only_root = |bytes: Vec<u8>| {
        let root = call.root as usize;
        (0..ranks).map(|rank| if rank == root { bytes.clone() } else { Vec::new() }).collect()
    };
    Ok(match call.kind {
        Kind::AllReduce => vec![reduced(); ranks],
        Kind::ReduceScatter => {
            let (all, part) = (reduced(), call.count as usize * dtype.size());
            (0..ranks).map(|rank| all[rank * part..][..part].to_vec()).collect()
        }
        Kind::AllGather => vec![inputs.concat(); ranks],
        Kind::Broadcast => vec![inputs[call.root as usize].to_vec(); ranks],
        Kind::Reduce => only_root(reduced()),
    })
}
