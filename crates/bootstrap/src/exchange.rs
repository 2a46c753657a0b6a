//! Exchanges on top of any store: every rank gives some bytes and gets everybody's.
//!
//! A store may outlive the processes that used it: torchrun's agent keeps its store over a restart, and keys a
//! dead attempt left there must not be taken for new ones. So each exchange is led by its rank 0, which makes
//! a random *nonce* and announces it; everything else lives under that nonce:
//!
//! ```text
//! SCOPE/lead            counter: how many leaders have begun this scope
//! SCOPE/lead/N          the nonce of the N-th
//! SCOPE/NONCE/claim/R   counter: processes that took rank R under this leader
//! SCOPE/NONCE/part/R/C  what the C-th of them gave: its random mark, then its bytes
//! SCOPE/NONCE/all       the leader's verdict: everybody's bytes or what went wrong, and whose marks it saw
//! ```
//!
//! Invariants:
//! 1. A rank believes only a verdict that holds its own mark. One that does not is a dead attempt's, or another
//!    process has our rank, or we came too late: each time a newer leader must come, or the exchange fails.
//! 2. A rank that waits looks, now and then, for a newer leader and moves over to it; a leader that finds a newer one
//!    gives up at once.
//! 3. Parts under a leader's nonce can only come from processes that saw this leader alive in the store, so a
//!    leader never takes a dead attempt's part.
//! 4. A scope is used once in the life of a group's processes; callers number theirs.
//!
//! The cost is 5 store operations a rank, 2 more a rank for the leader, whatever the store.

use std::time::{Duration, Instant};

use smddp_core::store::Store;

use crate::error::{Error, Result};
use crate::host;

/// First and longest wait before a look for a newer leader.
const FIRST_LOOK: Duration = Duration::from_millis(200);
const LONGEST_LOOK: Duration = Duration::from_secs(2);
/// How much longer than its own deadline a rank waits for the leader's verdict on who is missing.
const VERDICT: Duration = Duration::from_secs(2);

/// How many processes of one rank hear of each other.
const MOST_TWINS: i64 = 8;

/// Verdicts, first byte of `all`.
const DONE: u8 = 1;
const MISSING: u8 = 2;
const DUPLICATE: u8 = 3;

/// What all ranks gave, in rank order. Every rank of the group calls it with the same `scope` and `size`; a
/// scope is used once (invariant 4). The bytes may differ in length.
///
/// # Errors
/// [`Error::Missing`] at the deadline, naming the ranks that have not come; [`Error::DuplicateRank`] when two
/// processes gave for one rank.
pub fn all_gather(
    store: &dyn Store,
    scope: &str,
    rank: usize,
    size: usize,
    bytes: &[u8],
    deadline: Instant,
) -> Result<Vec<Vec<u8>>> {
    let exchange = Exchange { store, scope, rank, size, start: Instant::now(), deadline };
    if rank >= size {
        return Err(exchange.garbage(format!("rank {rank} of {size} ranks")));
    }
    if rank == 0 { exchange.lead(bytes) } else { exchange.follow(bytes) }
}

/// Waits until every rank of the group has called it.
///
/// # Errors
/// As [`all_gather`].
pub fn barrier(store: &dyn Store, scope: &str, rank: usize, size: usize, deadline: Instant) -> Result<()> {
    all_gather(store, scope, rank, size, &[], deadline).map(|_| ())
}

struct Exchange<'a> {
    store: &'a dyn Store,
    scope: &'a str,
    rank: usize,
    size: usize,
    start: Instant,
    deadline: Instant,
}

/// How following one leader ended.
enum Given {
    /// A verdict that holds our mark.
    Settled(Verdict),
    /// There is a newer leader.
    Overtaken,
    /// Nothing for us; the error to report if no newer leader comes.
    Passed(Error),
}

/// How a wait for one key ended.
enum Waited {
    Value(Vec<u8>),
    NotYet,
}

impl Exchange<'_> {
    fn leads(&self) -> String {
        format!("{}/lead", self.scope)
    }

    fn key(&self, nonce: u64, what: &str) -> String {
        format!("{}/{nonce:016x}/{what}", self.scope)
    }

    /// One wait, no longer than `until`.
    fn wait(&self, key: &str, until: Instant) -> Result<Waited> {
        match self.store.get(key, until) {
            Ok(value) => Ok(Waited::Value(value)),
            Err(smddp_core::Error::Timeout { .. }) => Ok(Waited::NotYet),
            Err(error) => Err(error.into()),
        }
    }

    fn leaders(&self) -> Result<i64> {
        Ok(self.store.add(&self.leads(), 0)?)
    }

    fn garbage(&self, what: String) -> Error {
        Error::Store(smddp_core::Error::Bootstrap {
            what: format!("{}: {what}", self.scope),
            hint: "Every rank of the group must call with the same name and size, and its own rank"
                .to_owned(),
        })
    }

    fn missing(&self, missing: Vec<usize>) -> Error {
        Error::Missing { scope: self.scope.to_owned(), waited: self.start.elapsed(), missing }
    }

    fn duplicate(&self, rank: usize) -> Error {
        Error::DuplicateRank { scope: self.scope.to_owned(), rank }
    }

    /// Rank 0: announces a nonce, collects the parts, publishes the verdict.
    fn lead(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        let nonce = host::random_u64();
        // Counter and nonce are two steps; followers wait for the second.
        let number = self.store.add(&self.leads(), 1)?;
        self.store.set(&format!("{}/{number}", self.leads()), &nonce.to_le_bytes())?;
        let verdict = self.collect(nonce, number, mine)?;
        self.store.set(&self.key(nonce, "all"), &verdict.encode())?;
        self.outcome(verdict)
    }

    fn outcome(&self, verdict: Verdict) -> Result<Vec<Vec<u8>>> {
        match verdict.kind {
            DONE => Ok(verdict.parts.into_iter().map(|part| part.bytes).collect()),
            MISSING => Err(self.missing(verdict.ranks)),
            _ => Err(self.duplicate(verdict.ranks.first().copied().unwrap_or(0))),
        }
    }

    fn collect(&self, nonce: u64, number: i64, mine: &[u8]) -> Result<Verdict> {
        let mut parts = vec![Part { mark: nonce, bytes: mine.to_vec() }];
        let mut missing = Vec::new();
        for rank in 1..self.size {
            match self.collect_one(nonce, number, rank)? {
                Some(part) => parts.push(part),
                None => missing.push(rank),
            }
        }
        let marks_of =
            |parts: &[Part]| parts.iter().map(|p| Part { mark: p.mark, bytes: Vec::new() }).collect();
        for rank in 1..self.size {
            let claims = self.store.add(&self.key(nonce, &format!("claim/{rank}")), 0)?;
            if claims > 1 {
                let mut parts: Vec<Part> = marks_of(&parts);
                // All of them should hear of it, as far as they are quick to say who they are.
                for other in 2..=claims.min(MOST_TWINS) {
                    let key = self.key(nonce, &format!("part/{rank}/{other}"));
                    if let Waited::Value(value) = self.wait(&key, Instant::now() + FIRST_LOOK)? {
                        parts.extend(Part::decode(&value).map(|p| Part { bytes: Vec::new(), ..p }));
                    }
                }
                return Ok(Verdict { kind: DUPLICATE, ranks: vec![rank], parts });
            }
        }
        if !missing.is_empty() {
            return Ok(Verdict { kind: MISSING, ranks: missing, parts: marks_of(&parts) });
        }
        Ok(Verdict { kind: DONE, ranks: Vec::new(), parts })
    }

    /// `None`: not by the deadline.
    fn collect_one(&self, nonce: u64, number: i64, rank: usize) -> Result<Option<Part>> {
        let key = self.key(nonce, &format!("part/{rank}/1"));
        let mut look = FIRST_LOOK;
        loop {
            let until = self.deadline.min(Instant::now() + look);
            if let Waited::Value(value) = self.wait(&key, until)? {
                let part = Part::decode(&value);
                return part.map(Some).ok_or_else(|| self.garbage(format!("rank {rank} gave garbage")));
            }
            if self.leaders()? > number {
                return Err(self.duplicate(0));
            }
            if Instant::now() >= self.deadline {
                return Ok(None);
            }
            look = (look * 2).min(LONGEST_LOOK);
        }
    }

    /// Another rank: gives its part to the newest leader and waits for the verdict.
    fn follow(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        let mine = Part { mark: host::random_u64(), bytes: mine.to_vec() };
        let mut followed = 0;
        // What to say if no newer leader comes.
        let mut complaint = None;
        let mut look = FIRST_LOOK;
        loop {
            // The newest leader; if there is none yet, or only those of dead attempts, the next one. A leader may end
            // between its number and its nonce, so that a newer one must be looked for here, too (invariant 2).
            let newest = self.leaders()?.max(followed + 1);
            let key = format!("{}/{newest}", self.leads());
            if let Waited::Value(nonce) = self.wait(&key, self.deadline.min(Instant::now() + look))? {
                let nonce = <[u8; 8]>::try_from(nonce.as_slice());
                let nonce = nonce.map_err(|_| self.garbage("the leader's nonce is garbage".to_owned()))?;
                followed = newest;
                look = FIRST_LOOK;
                match self.give(u64::from_le_bytes(nonce), newest, &mine)? {
                    Given::Settled(verdict) => return self.outcome(verdict),
                    Given::Overtaken => continue,
                    Given::Passed(why) => complaint = Some(why),
                }
            }
            if Instant::now() >= self.deadline {
                return Err(complaint.unwrap_or_else(|| self.missing(vec![0])));
            }
            look = (look * 2).min(LONGEST_LOOK);
        }
    }

    /// Gives our part to one leader and waits for its verdict.
    fn give(&self, nonce: u64, number: i64, mine: &Part) -> Result<Given> {
        let claim = self.store.add(&self.key(nonce, &format!("claim/{}", self.rank)), 1)?;
        self.store.set(&self.key(nonce, &format!("part/{}/{claim}", self.rank)), &mine.encode())?;
        let all = self.key(nonce, "all");
        let mut look = FIRST_LOOK;
        loop {
            let end = self.deadline + VERDICT;
            if let Waited::Value(verdict) = self.wait(&all, end.min(Instant::now() + look))? {
                return self.judge(&verdict, mine.mark);
            }
            if self.leaders()? > number {
                return Ok(Given::Overtaken);
            }
            if Instant::now() >= end {
                return Ok(Given::Passed(self.missing(self.absent(nonce)?)));
            }
            look = (look * 2).min(LONGEST_LOOK);
        }
    }

    /// Reads a verdict (invariant 1).
    fn judge(&self, bytes: &[u8], mark: u64) -> Result<Given> {
        let garbage = || self.garbage("the leader's verdict is garbage".to_owned());
        let verdict = Verdict::decode(bytes).ok_or_else(garbage)?;
        if verdict.kind == DONE && verdict.parts.len() != self.size {
            return Err(self.garbage(format!(
                "the group has {} ranks by rank 0, {} by rank {}",
                verdict.parts.len(),
                self.size,
                self.rank
            )));
        }
        if verdict.parts.iter().any(|part| part.mark == mark) {
            return Ok(Given::Settled(verdict));
        }
        Ok(Given::Passed(match verdict.kind {
            // It waited in vain, for us among others.
            MISSING => self.missing(vec![0]),
            _ => self.duplicate(self.rank),
        }))
    }

    /// Who has no part under `nonce`, asked of the store itself: the leader never gave its verdict.
    fn absent(&self, nonce: u64) -> Result<Vec<usize>> {
        let mut absent = vec![0];
        let enough = Instant::now() + VERDICT;
        for rank in 1..self.size {
            if Instant::now() > enough {
                break;
            }
            if self.store.add(&self.key(nonce, &format!("claim/{rank}")), 0)? == 0 {
                absent.push(rank);
            }
        }
        Ok(absent)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Part {
    mark: u64,
    bytes: Vec<u8>,
}

impl Part {
    fn encode(&self) -> Vec<u8> {
        let mut out = self.mark.to_le_bytes().to_vec();
        out.extend(&self.bytes);
        out
    }

    fn decode(bytes: &[u8]) -> Option<Part> {
        let (mark, bytes) = bytes.split_first_chunk::<8>()?;
        Some(Part { mark: u64::from_le_bytes(*mark), bytes: bytes.to_vec() })
    }
}

/// What the leader found.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Verdict {
    kind: u8,
    /// The missing ranks, or the one that is taken twice.
    ranks: Vec<usize>,
    /// In rank order when all is well; else whom the verdict is for, without bytes.
    parts: Vec<Part>,
}

impl Verdict {
    /// Kind, number of ranks (u32), ranks (u32 each), then each part after its length (u32).
    fn encode(&self) -> Vec<u8> {
        let mut out = vec![self.kind];
        out.extend((self.ranks.len() as u32).to_le_bytes());
        out.extend(self.ranks.iter().flat_map(|&rank| (rank as u32).to_le_bytes()));
        for part in &self.parts {
            let encoded = part.encode();
            out.extend((encoded.len() as u32).to_le_bytes());
            out.extend(encoded);
        }
        out
    }

    fn decode(bytes: &[u8]) -> Option<Verdict> {
        let (&kind, bytes) = bytes.split_first()?;
        if !matches!(kind, DONE | MISSING | DUPLICATE) {
            return None;
        }
        let (count, bytes) = number(bytes)?;
        let (ranks, mut bytes) = bytes.split_at_checked(count.checked_mul(4)?)?;
        let ranks = ranks.chunks_exact(4).map(|r| u32::from_le_bytes([r[0], r[1], r[2], r[3]]) as usize);
        let mut parts = Vec::new();
        while !bytes.is_empty() {
            let (length, rest) = number(bytes)?;
            let (part, rest) = rest.split_at_checked(length)?;
            parts.push(Part::decode(part)?);
            bytes = rest;
        }
        Some(Verdict { kind, ranks: ranks.collect(), parts })
    }
}

fn number(bytes: &[u8]) -> Option<(usize, &[u8])> {
    let (first, rest) = bytes.split_first_chunk::<4>()?;
    Some((u32::from_le_bytes(*first) as usize, rest))
}

#[cfg(test)]
#[path = "exchange_tests.rs"]
mod tests;
