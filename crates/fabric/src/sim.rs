//! A deterministic network in memory: the domain that tests run over.
//!
//! Everything happens in [`Domain::poll`]: each call is one step of time, in which what is due at that endpoint
//! arrives. One seed gives one history, as long as the endpoints are polled in the same order. It checks what real
//! hardware would punish: sources and targets outside registered memory, keys that are not (any more) known.
//!
//! A write's bytes are read from the sender's memory when they arrive, not when posted, so a source that is used
//! again too early shows as wrong data.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use smddp_core::memory::{Owner, Region};

use crate::domain::{Armed, Caps, Completion, Domain, Mr, PeerAddr, Post, Refused, Remote};
use crate::error::Error;
use crate::wire::{self, Body, Packet};

/// How the network behaves.
#[derive(Clone, Copy, Debug)]
pub struct SimConfig {
    pub seed: u64,
    pub rma: bool,
    pub needs_local_mr: bool,
    pub virt_addr: bool,
    pub prov_key: bool,
    pub max_msg: usize,
    /// A message arrives 1 to this many steps after it was posted.
    pub max_delay: u64,
    /// Whether messages between two endpoints may overtake each other.
    pub reorder: bool,
    /// Bytes that pass from one endpoint to another in a step, in the order posted; none: any number, in any.
    pub rate: Option<usize>,
    /// Operations an endpoint may have in flight; more are refused with "again".
    pub depth: usize,
    /// Of 1000 posts, how many are refused with "again" for no reason.
    pub moody: u32,
    /// A send or write completes when posted (as into a socket), not when it has arrived; its bytes are copied.
    pub early_completion: bool,
    /// Ends say goodbye, as over sockets.
    pub sockets: bool,
    /// Where the bytes of a device's memory really lie, from its address on; none: memory of devices is out of reach.
    pub devices: Option<isize>,
}

impl Default for SimConfig {
    fn default() -> Self {
        SimConfig {
            seed: 0,
            rma: true,
            needs_local_mr: false,
            virt_addr: false,
            prov_key: false,
            max_msg: usize::MAX,
            max_delay: 8,
            reorder: true,
            rate: None,
            depth: 64,
            moody: 0,
            early_completion: false,
            sockets: false,
            devices: None,
        }
    }
}

#[derive(Debug)]
enum Source {
    Memory(Region),
    Copy(Vec<u8>),
}

#[derive(Debug)]
enum What {
    Small,
    Write { addr: u64, key: u64, data: u32 },
    Tagged { tag: u64 },
}

#[derive(Debug)]
struct Flying {
    from: usize,
    to: usize,
    due: u64,
    source: Source,
    len: usize,
    what: What,
    ctx: u64,
}

/// Registered memory.
#[derive(Clone, Copy, Debug)]
struct Known {
    region: Region,
    key: u64,
    /// From its addresses to where its bytes are.
    shift: isize,
}

impl Known {
    /// Where the bytes of a part of it are.
    fn bytes(&self, part: Region) -> Region {
        // SAFETY: a device's memory of a test lies as far from its address as the test has said (D2).
        unsafe { Region::new(part.as_ptr().wrapping_offset(self.shift), part.len()) }
    }

    fn covers(&self, part: Region) -> bool {
        let (start, at) = (self.region.as_ptr() as usize, part.as_ptr() as usize);
        at >= start && at + part.len() <= start + self.region.len()
    }
}

#[derive(Debug, Default)]
struct End {
    dead: bool,
    closed: bool,
    /// Polled in this round.
    polled: bool,
    slots: Vec<(Region, u64)>,
    tagged: Vec<(u64, Region, u64)>,
    memory: BTreeMap<u32, Known>,
    next_mr: u32,
    done: Vec<Completion>,
    in_flight: usize,
}

#[derive(Debug)]
struct Net {
    config: SimConfig,
    random: u64,
    step: u64,
    /// The clock, and what a step adds to it.
    time: Duration,
    pace: Duration,
    /// A step is a round: over when every end that lives was polled.
    rounds: bool,
    ends: Vec<End>,
    flying: Vec<Flying>,
    /// (from, to): when the last message arrives, to keep order where asked.
    last: BTreeMap<(usize, usize), u64>,
    cut: Vec<(usize, usize)>,
    small_sent: u64,
    lose: Option<u64>,
    lose_write: Option<usize>,
    kill_at: Option<(u64, usize)>,
    posted: u64,
    /// (from, to): bytes of users' messages that have arrived.
    carried: BTreeMap<(usize, usize), u64>,
}

/// The network; clones share it.
#[derive(Clone, Debug)]
pub struct SimNet(Arc<Mutex<Net>>);

impl SimNet {
    pub fn new(config: SimConfig) -> SimNet {
        SimNet(Arc::new(Mutex::new(Net {
            config,
            random: config.seed ^ 0x9e37_79b9_7f4a_7c15,
            step: 0,
            time: Duration::ZERO,
            pace: Duration::from_micros(10),
            rounds: false,
            ends: Vec::new(),
            flying: Vec::new(),
            last: BTreeMap::new(),
            cut: Vec::new(),
            small_sent: 0,
            lose: None,
            lose_write: None,
            kill_at: None,
            posted: 0,
            carried: BTreeMap::new(),
        })))
    }

    /// A new endpoint.
    pub fn domain(&self) -> SimDomain {
        let mut net = self.lock();
        let end = net.ends.len();
        net.ends.push(End::default());
        SimDomain { net: self.clone(), end, name: (end as u64).to_le_bytes() }
    }

    /// Memory that is registered, of all endpoints.
    pub fn registrations(&self) -> usize {
        self.lock().ends.iter().map(|end| end.memory.len()).sum()
    }

    /// Endpoint `end` (in order of [`SimNet::domain`]) dies when `step` is reached: everything to or from it fails.
    pub fn kill_at(&self, step: u64, end: usize) {
        self.lock().kill_at = Some((step, end));
    }

    /// Loses the `n`th small message of all, counted from 0, without a word.
    pub fn lose(&self, n: u64) {
        self.lock().lose = Some(n);
    }

    /// Loses the next write of endpoint `from` (in order of [`SimNet::domain`]), without a word.
    pub fn lose_write(&self, from: usize) {
        self.lock().lose_write = Some(from);
    }

    /// From now on nothing passes between two endpoints, either way, and nobody is told.
    pub fn cut(&self, a: usize, b: usize) {
        self.lock().cut.extend([(a, b), (b, a)]);
    }

    /// What one step adds to the clock; 10 µs at first. Time limits should be out of reach where endpoints are polled
    /// by several threads, and near where a test waits for one.
    pub fn pace(&self, step: Duration) {
        self.lock().pace = step;
    }

    /// Whether from now on a step takes a poll of every end: one that is polled by a thread of its own then runs out of time
    /// only when the others had theirs.
    pub fn in_rounds(&self, rounds: bool) {
        self.lock().rounds = rounds;
    }

    pub fn step(&self) -> u64 {
        self.lock().step
    }

    /// Small messages that were sent so far, of all endpoints.
    pub fn small_messages(&self) -> u64 {
        self.lock().small_sent
    }

    /// Bytes of users' messages that have arrived from one endpoint at another (in order of [`SimNet::domain`]), headers and
    /// all else that the message layer says to itself left out.
    pub fn carried(&self, from: usize, to: usize) -> u64 {
        self.lock().carried.get(&(from, to)).copied().unwrap_or(0)
    }

    fn lock(&self) -> MutexGuard<'_, Net> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Net {
    fn dice(&mut self, sides: u64) -> u64 {
        // Xorshift: any generator will do, the seed makes the history.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) % sides.max(1)
    }

    fn post(&mut self, from: usize, to: u64, source: Region, what: What, ctx: u64) -> Post {
        self.admit(from)?;
        let to = to as usize;
        if self.ends.get(to).is_none_or(|e| e.dead || e.closed) {
            return Err(Refused::Peer("no such endpoint".to_owned()));
        }
        assert!(source.len() <= self.config.max_msg, "a message of {} bytes", source.len());
        self.posted += 1;
        let small = matches!(what, What::Small);
        let lost = match what {
            What::Small => self.lose == Some(self.small_sent),
            What::Write { .. } => self.lose_write.take_if(|victim| *victim == from).is_some(),
            What::Tagged { .. } => false,
        };
        self.small_sent += u64::from(small);
        let len = source.len();
        let mut due = self.step + 1 + self.dice(self.config.max_delay);
        let last = self.last.entry((from, to)).or_insert(0);
        if let Some(rate) = self.config.rate {
            due = due.max(self.step.max(*last) + len.div_ceil(rate) as u64);
        }
        if self.config.rate.is_some() || !self.config.reorder {
            due = due.max(*last);
            *last = due;
        }
        let early = self.config.early_completion;
        if early || lost {
            self.ends[from].done.push(Completion::Done { ctx, len: 0 });
        }
        if lost || self.cut.contains(&(from, to)) {
            return Ok(());
        }
        let source = if early { Source::Copy(read(source)) } else { Source::Memory(source) };
        self.ends[from].in_flight += 1;
        self.flying.push(Flying { from, to, due, source, len, what, ctx });
        Ok(())
    }

    fn admit(&mut self, from: usize) -> Result<(), Refused> {
        let end = &self.ends[from];
        if end.dead || end.closed {
            return Err(Refused::Broken("the endpoint is dead".to_owned()));
        }
        if end.in_flight >= self.config.depth || self.dice(1000) < u64::from(self.config.moody) {
            return Err(Refused::Again);
        }
        Ok(())
    }

    fn advance(&mut self, end: usize) {
        self.ends[end].polled = true;
        if !self.rounds || self.ends.iter().all(|e| e.polled || e.dead || e.closed) {
            self.ends.iter_mut().for_each(|e| e.polled = false);
            self.step += 1;
            self.time += self.pace;
        }
        if let Some((step, victim)) = self.kill_at
            && self.step >= step
        {
            self.kill_at = None;
            self.kill(victim);
        }
        let mut i = 0;
        while i < self.flying.len() {
            let f = &self.flying[i];
            if f.to == end && f.due <= self.step && self.ready(f) {
                // Keeps the order of what is due, where order is kept.
                let f = self.flying.remove(i);
                self.arrive(f);
            } else {
                i += 1;
            }
        }
    }

    /// A small or tagged message waits for its receive.
    fn ready(&self, f: &Flying) -> bool {
        let end = &self.ends[f.to];
        match f.what {
            What::Small => !end.slots.is_empty(),
            What::Write { .. } => true,
            What::Tagged { tag } => end.tagged.iter().any(|(t, ..)| *t == tag),
        }
    }

    fn arrive(&mut self, f: Flying) {
        self.ends[f.from].in_flight -= 1;
        let bytes = match &f.source {
            Source::Copy(bytes) => bytes.clone(),
            Source::Memory(region) => read(*region),
        };
        let carried = match f.what {
            What::Small => match wire::decode(&bytes) {
                Some(Packet { body: Body::Eager { data, .. }, .. }) => data.len(),
                _ => 0,
            },
            What::Write { .. } | What::Tagged { .. } => bytes.len(),
        };
        let good = match f.what {
            What::Small => {
                let (slot, ctx) = self.ends[f.to].slots.remove(0);
                self.land(f.to, slot, &bytes, ctx)
            }
            What::Tagged { tag } => {
                let end = &mut self.ends[f.to];
                match end.tagged.iter().position(|(t, ..)| *t == tag) {
                    Some(i) => {
                        let (_, region, ctx) = end.tagged.remove(i);
                        self.land(f.to, region, &bytes, ctx)
                    }
                    None => false,
                }
            }
            What::Write { addr, key, data } => match self.target(f.to, addr, key, f.len) {
                Some(region) => {
                    write(region, &bytes);
                    self.ends[f.to].done.push(Completion::Arrived { data });
                    true
                }
                None => false,
            },
        };
        if good {
            *self.carried.entry((f.from, f.to)).or_insert(0) += carried as u64;
        }
        if good && !self.config.early_completion {
            self.ends[f.from].done.push(Completion::Done { ctx: f.ctx, len: 0 });
        } else if !good {
            self.fail(f.from, Some(f.ctx), f.to, "the peer refused it");
        }
    }

    fn land(&mut self, end: usize, into: Region, bytes: &[u8], ctx: u64) -> bool {
        if bytes.len() > into.len() {
            self.fail(end, Some(ctx), end, "truncated");
            return false;
        }
        write(into.slice(0, bytes.len()), bytes);
        self.ends[end].done.push(Completion::Done { ctx, len: bytes.len() });
        true
    }

    fn target(&self, end: usize, addr: u64, key: u64, len: usize) -> Option<Region> {
        let virt = self.config.virt_addr;
        self.ends[end].memory.values().find_map(|known| {
            let base = if virt { known.region.as_ptr() as u64 } else { 0 };
            let offset = addr.checked_sub(base)? as usize;
            let fits = known.key == key && offset.checked_add(len)? <= known.region.len();
            if fits { Some(known.bytes(known.region.slice(offset, len))) } else { None }
        })
    }

    fn fail(&mut self, end: usize, ctx: Option<u64>, peer: usize, reason: &str) {
        self.ends[end].done.push(Completion::Failed {
            ctx,
            data: None,
            peer: Some(peer as u64),
            canceled: false,
            reason: reason.to_owned(),
        });
    }

    fn kill(&mut self, victim: usize) {
        self.ends[victim].dead = true;
        self.drop_of(victim, true);
    }

    /// Ends all traffic of an endpoint; the other sides of its operations are told where `tell`.
    fn drop_of(&mut self, victim: usize, tell: bool) {
        for f in std::mem::take(&mut self.flying) {
            if f.from == victim {
                if tell {
                    self.fail(f.to, None, victim, "connection reset");
                }
            } else if f.to == victim {
                self.ends[f.from].in_flight -= 1;
                if !self.config.early_completion {
                    self.fail(f.from, Some(f.ctx), victim, "connection reset");
                }
            } else {
                self.flying.push(f);
            }
        }
    }

    /// Where the bytes of a local buffer are, which must lie in the memory registered as `mr` where that is needed.
    fn local(&self, end: usize, region: Region, mr: Option<Mr>) -> Region {
        let known = mr.and_then(|mr| self.ends[end].memory.get(&mr.id)).filter(|known| known.covers(region));
        let is_free = !self.config.needs_local_mr || region.is_empty();
        assert!(known.is_some() || is_free, "a local buffer outside registered memory");
        known.map_or(region, |known| known.bytes(region))
    }
}

fn read(region: Region) -> Vec<u8> {
    // SAFETY: the region was posted and not completed, so its owner keeps it valid (D2).
    unsafe { std::slice::from_raw_parts(region.as_ptr(), region.len()) }.to_vec()
}

fn write(region: Region, bytes: &[u8]) {
    assert_eq!(region.len(), bytes.len());
    // SAFETY: a posted receive's or registered memory's region, valid until completed or deregistered (D2), as long
    // as the source (checked).
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), region.as_ptr(), bytes.len()) }
}

/// One endpoint of a [`SimNet`].
#[derive(Debug)]
pub struct SimDomain {
    net: SimNet,
    end: usize,
    name: [u8; 8],
}

impl Domain for SimDomain {
    fn caps(&self) -> Caps {
        let c = self.net.lock().config;
        Caps {
            rma: c.rma,
            needs_local_mr: c.needs_local_mr,
            virt_addr: c.virt_addr,
            prov_key: c.prov_key,
            max_msg: c.max_msg,
            sockets: c.sockets,
            ordered: !c.reorder || c.rate.is_some(),
            devices: c.devices.is_some(),
        }
    }

    fn describe(&self) -> String {
        format!("sim{}", self.end)
    }

    fn address(&self) -> &[u8] {
        &self.name
    }

    fn insert(&mut self, address: &[u8]) -> Result<PeerAddr, Error> {
        match address.try_into() {
            Ok(bytes) => Ok(u64::from_le_bytes(bytes)),
            Err(_) => Err(Error::Address { label: "sim".to_owned(), reason: "not 8 bytes".to_owned() }),
        }
    }

    fn register(&mut self, memory: Region, owner: Owner, _remote: bool) -> Result<Mr, Error> {
        let mut net = self.net.lock();
        let (virt, prov_key) = (net.config.virt_addr, net.config.prov_key);
        let shift = match (owner, net.config.devices) {
            (Owner::Host, _) => 0,
            (Owner::Cuda(_), Some(shift)) => shift,
            (Owner::Cuda(_), None) => panic!("a device's memory is out of reach"),
        };
        let key = if prov_key { net.dice(u64::MAX) } else { 0 };
        let end = &mut net.ends[self.end];
        let id = end.next_mr;
        end.next_mr += 1;
        let key = if prov_key { key } else { u64::from(id) };
        end.memory.insert(id, Known { region: memory, key, shift });
        Ok(Mr { id, key, base: if virt { memory.as_ptr() as u64 } else { 0 } })
    }

    fn deregister(&mut self, mr: Mr) {
        self.net.lock().ends[self.end].memory.remove(&mr.id);
    }

    fn send(&mut self, to: PeerAddr, from: Region, mr: Mr, ctx: u64) -> Post {
        let mut net = self.net.lock();
        let from = net.local(self.end, from, Some(mr));
        net.post(self.end, to, from, What::Small, ctx)
    }

    fn recv(&mut self, into: Region, mr: Mr, ctx: u64) -> Post {
        let mut net = self.net.lock();
        let into = net.local(self.end, into, Some(mr));
        net.ends[self.end].slots.push((into, ctx));
        Ok(())
    }

    fn write(&mut self, to: Remote, from: Region, mr: Option<Mr>, data: u32, ctx: u64) -> Post {
        let mut net = self.net.lock();
        let from = net.local(self.end, from, mr);
        net.post(self.end, to.peer, from, What::Write { addr: to.addr, key: to.key, data }, ctx)
    }

    fn tagged_send(&mut self, to: PeerAddr, from: Region, mr: Option<Mr>, tag: u64, ctx: u64) -> Post {
        let mut net = self.net.lock();
        let from = net.local(self.end, from, mr);
        net.post(self.end, to, from, What::Tagged { tag }, ctx)
    }

    fn tagged_recv(&mut self, into: Region, mr: Option<Mr>, tag: u64, ctx: u64) -> Post {
        let mut net = self.net.lock();
        let into = net.local(self.end, into, mr);
        if net.dice(1000) < u64::from(net.config.moody) {
            return Err(Refused::Again);
        }
        net.ends[self.end].tagged.push((tag, into, ctx));
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> Result<(), String> {
        let mut net = self.net.lock();
        if net.ends[self.end].dead {
            return Err("the endpoint is dead".to_owned());
        }
        net.advance(self.end);
        let mut done = std::mem::take(&mut net.ends[self.end].done);
        if net.config.reorder && done.len() > 1 {
            let i = net.dice(done.len() as u64) as usize;
            done.swap(0, i);
        }
        out.append(&mut done);
        net.ends[self.end].done = done;
        Ok(())
    }

    fn cancel(&mut self, ctx: u64) {
        let mut net = self.net.lock();
        let end = &mut net.ends[self.end];
        let Some(i) = end.tagged.iter().position(|(_, _, c)| *c == ctx) else { return };
        end.tagged.remove(i);
        let reason = "canceled".to_owned();
        end.done.push(Completion::Failed { ctx: Some(ctx), data: None, peer: None, canceled: true, reason });
    }

    fn arm(&mut self) -> Armed {
        Armed::Blind
    }

    fn now(&self) -> Duration {
        self.net.lock().time
    }

    fn close(&mut self, _stuck: bool) {
        let mut net = self.net.lock();
        let end = &mut net.ends[self.end];
        end.closed = true;
        end.slots.clear();
        end.tagged.clear();
        end.memory.clear();
        let end = self.end;
        net.drop_of(end, true);
    }
}
