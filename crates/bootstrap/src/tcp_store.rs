//! Our own key-value store over TCP: rank 0 hosts it, every rank (rank 0 too) is its client.
//!
//! Used where no store is given: after MPI told everybody the address, or at MASTER_ADDR with launcher
//! variables alone.
//!
//! Invariants:
//! 1. Every wait has a deadline; set and add end after `IO_TIME`.
//! 2. A connection carries one request at a time; threads that wait at the same time have one connection each.
//!    A connection on which anything went wrong is dropped, never used again.
//! 3. What answers is believed only after its magic, and a store of another job is passed over, so several
//!    candidate addresses can be tried in turn.
//!
//! What the secret is for: it keeps jobs apart that meet on a port by accident. It travels in the clear, and
//! where it is derived from launcher variables anybody who knows them can compute it. It is no protection against an
//! attacker on the network: keep the ports of a training cluster closed to strangers.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use smddp_core::interrupt;
use smddp_core::store::Store;

use crate::descriptors;
use crate::dial::dial;
use crate::error::{Error, Result};
use crate::host;
use crate::kv;
use crate::lookup::{self, Lookup, Resolver};
use crate::server::{BACKLOG, Server, keep_alive};
use crate::wire::{self, Hello, MAGIC, Op, REPLY, Request, Secret, Status};

/// Longest time a request that does not wait may take, and what a waiting one may take beyond its deadline.
const IO_TIME: Duration = Duration::from_secs(30);
/// Time of one attempt to connect and to be greeted: short at first, so that something silent on a candidate
/// address costs little, doubled each round for a rank 0 that is busy with thousands.
const FIRST_ATTEMPT: Duration = Duration::from_millis(250);
const LONGEST_ATTEMPT: Duration = Duration::from_secs(8);
/// How long rank 0 asks who has one of its ports: the others look for it meanwhile, and what is silent is hardly its twin.
const TWIN_TIME: Duration = Duration::from_secs(1);
/// Pauses between rounds over the candidates.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);
const NO_ANSWER: &str = "no answer in time";
/// How long rank 0 goes on serving when its store is dropped and others have not left.
pub const LINGER: Duration = Duration::from_secs(10);

/// Who a client is, and in which job.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    pub rank: usize,
    pub size: usize,
    /// Equal on all ranks of the job.
    pub secret: [u8; 16],
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Identity(rank {} of {})", self.rank, self.size)
    }
}

/// Where rank 0 may listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    /// Only this host can connect.
    pub loopback: bool,
    /// Tried in order, the first free one is taken; 0 lets the system choose.
    pub ports: Vec<u16>,
}

/// A rank's access to the store; rank 0's also runs it.
#[derive(Debug)]
pub struct TcpStore {
    identity: Identity,
    process: u64,
    address: SocketAddr,
    idle: Mutex<Vec<TcpStream>>,
    server: Option<Server>,
    /// A forked child has our connections but is not the rank: it must not say goodbye on them.
    owner: u32,
}

impl TcpStore {
    /// Rank 0: starts the store. Does not wait for the others; see [`TcpStore::ready`].
    ///
    /// # Errors
    /// [`Error::Listen`] when no port is free; [`Error::Descriptors`] when this process may not have as many connections as
    /// there are ranks; [`Error::Disagree`] when a port is taken by a rank 0 of this
    /// very job.
    pub fn host(identity: Identity, listen: &Listen, deadline: Instant) -> Result<TcpStore> {
        let process = host::random_u64();
        let any = if listen.loopback {
            vec![IpAddr::V4(Ipv4Addr::LOCALHOST)]
        } else {
            // The IPv6 wildcard takes IPv4 too, where the host has IPv6 at all.
            vec![IpAddr::V6(Ipv6Addr::UNSPECIFIED), IpAddr::V4(Ipv4Addr::UNSPECIFIED)]
        };
        let mut reasons = Vec::new();
        for &port in &listen.ports {
            match bind(&any, port) {
                Ok(listener) => return TcpStore::serve(identity, process, listener, deadline),
                Err(error) => {
                    if error.kind() == std::io::ErrorKind::AddrInUse {
                        refuse_twin(identity, process, port, deadline)?;
                    }
                    reasons.push(format!("port {port}: {error}"));
                }
            }
        }
        let place = if listen.loopback { "127.0.0.1" } else { "this host" };
        let ports: Vec<String> = listen.ports.iter().map(u16::to_string).collect();
        Err(Error::Listen {
            addresses: format!("{place}, port {}", ports.join(", ")),
            reason: reasons.join("; "),
        })
    }

    fn serve(identity: Identity, process: u64, listener: TcpListener, deadline: Instant) -> Result<TcpStore> {
        let failed = |error: std::io::Error| Error::Listen {
            addresses: "this host".to_owned(),
            reason: error.to_string(),
        };
        descriptors::allow(identity.size)?;
        let bound = listener.local_addr().map_err(failed)?;
        let server = Server::start(listener, identity.size, identity.secret, process).map_err(failed)?;
        // The wildcard address with IPv6 still answers on IPv4's loopback.
        let address = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), bound.port());
        match TcpStore::reach(identity, process, &[address.to_string()], deadline) {
            Ok(mut store) => {
                store.server = Some(server);
                Ok(store)
            }
            Err(error) => {
                // Ranks that came before us must hear of it too.
                server.stop(Instant::now() + LINGER);
                Err(error)
            }
        }
    }

    /// Any rank: connects to the store at one of `candidates` ("host:port"), trying them in turn until `deadline`.
    ///
    /// # Errors
    /// [`Error::Unreachable`] when nobody answered as this job's store, with what each address said;
    /// [`Error::Disagree`] when rank 0 sees another job than we do.
    pub fn connect(identity: Identity, candidates: &[String], deadline: Instant) -> Result<TcpStore> {
        TcpStore::reach(identity, host::random_u64(), candidates, deadline)
    }

    fn reach(identity: Identity, process: u64, candidates: &[String], deadline: Instant) -> Result<TcpStore> {
        let mut hosts = CandidateHost::all(candidates, &lookup::system())?;
        TcpStore::reach_hosts(identity, process, &mut hosts, LONGEST_ATTEMPT, deadline)
    }

    /// `longest`: limit of a wait for a name's addresses, and then of an attempt at each port.
    fn reach_hosts(
        identity: Identity,
        process: u64,
        hosts: &mut [CandidateHost],
        longest: Duration,
        deadline: Instant,
    ) -> Result<TcpStore> {
        let start = Instant::now();
        let mut pause = FIRST_PAUSE;
        let mut patience = FIRST_ATTEMPT.min(longest);
        loop {
            for host in &mut *hosts {
                if let Some((stream, address)) = host.attempt(identity, process, patience, deadline)? {
                    let idle = Mutex::new(vec![stream]);
                    let owner = std::process::id();
                    return Ok(TcpStore { identity, process, address, idle, server: None, owner });
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || interrupt::came() {
                let all = || hosts.iter().flat_map(|host| &host.candidates);
                let addresses: Vec<&str> = all().map(|candidate| candidate.text.as_str()).collect();
                return Err(Error::Unreachable {
                    rank: identity.rank,
                    addresses: addresses.join(", "),
                    waited: start.elapsed(),
                    reason: summary(all()),
                });
            }
            // Spread the ranks, so that they do not knock together.
            let spread = Duration::from_millis(host::random_u64() % 10);
            std::thread::sleep(interrupt::slice((pause + spread).min(left)));
            pause = (pause * 2).min(LONGEST_PAUSE);
            patience = (patience * 2).min(longest);
        }
    }

    /// The port rank 0 listens on; `None` on other ranks.
    pub fn port(&self) -> Option<u16> {
        self.server.as_ref().map(Server::port)
    }

    /// Waits until every rank has connected.
    ///
    /// # Errors
    /// [`Error::Missing`] naming the ranks that have not; [`Error::Disagree`] when a rank contradicts another.
    pub fn ready(&self, deadline: Instant) -> Result<()> {
        let start = Instant::now();
        let (status, body) = self.ask(Op::Ready, milliseconds(deadline), "", &[], deadline)?;
        match status {
            Status::Timeout => {
                let missing = body.chunks_exact(4).map(|b| wire::u32_at(b, 0) as usize).collect();
                Err(Error::Missing { scope: "joining the job".to_owned(), waited: start.elapsed(), missing })
            }
            other => self.expect_ok(other, &body, "joining the job").map(|_| ()),
        }
    }

    fn expect_ok(&self, status: Status, body: &[u8], key: &str) -> Result<()> {
        let text = || String::from_utf8_lossy(body).into_owned();
        match status {
            Status::Ok => Ok(()),
            Status::Refused => Err(Error::Refused { key: key.to_owned(), reason: text() }),
            Status::Disagree => Err(Error::Disagree { what: text() }),
            Status::Timeout | Status::Stranger | Status::Ending => {
                Err(self.lost(key, format!("an answer out of place ({status:?})")))
            }
        }
    }

    fn lost(&self, op: &str, reason: impl Into<String>) -> Error {
        Error::Lost {
            rank: self.identity.rank,
            address: self.address.to_string(),
            op: op.to_owned(),
            reason: reason.into(),
        }
    }

    /// Sends a request and returns its answer. `until`: when the server answers at the latest.
    fn ask(&self, op: Op, number: i64, key: &str, value: &[u8], until: Instant) -> Result<(Status, Vec<u8>)> {
        let name = || format!("{op:?} {key}").trim().to_lowercase();
        let limit = until.max(Instant::now()) + IO_TIME;
        let mut stream = match self.idle_stream() {
            Some(stream) => stream,
            None => match attempt_each(self.identity, self.process, &[self.address], limit) {
                Ok((stream, _)) => stream,
                Err(Attempt::Fatal(error)) => return Err(error),
                Err(Attempt::Again(reason)) => return Err(self.lost(&name(), reason)),
            },
        };
        let request = Request::encode(op, number, key, value);
        let answer = send(&mut stream, &request, limit).and_then(|()| receive_reply(&mut stream, limit));
        match answer {
            Ok(answer) => {
                if op != Op::Goodbye {
                    self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(stream);
                }
                Ok(answer)
            }
            Err(error) => Err(self.lost(&name(), error.to_string())),
        }
    }

    /// A connection nobody uses and the server has not closed.
    fn idle_stream(&self) -> Option<TcpStream> {
        loop {
            let stream = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop()?;
            let mut byte = [0u8; 1];
            let quiet = stream.set_nonblocking(true).is_ok()
                && matches!(stream.peek(&mut byte), Err(e) if e.kind() == std::io::ErrorKind::WouldBlock)
                && stream.set_nonblocking(false).is_ok();
            if quiet {
                return Some(stream);
            }
        }
    }

    /// Leaves the store; rank 0 goes on serving until every rank has left or `linger` has passed.
    pub fn close(mut self, linger: Duration) {
        self.leave(linger);
    }

    fn leave(&mut self, linger: Duration) {
        if self.owner != std::process::id() {
            // The server's thread does not exist here either; joining it would never end.
            std::mem::forget(self.server.take());
            return;
        }
        let connected = !self.idle.lock().unwrap_or_else(PoisonError::into_inner).is_empty();
        if connected {
            // The server may be gone already: then there is nobody to tell.
            let _ = self.ask(Op::Goodbye, 0, "", &[], Instant::now());
            self.idle.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
        if let Some(server) = self.server.take() {
            server.stop(Instant::now() + linger);
        }
    }
}

impl Drop for TcpStore {
    fn drop(&mut self) {
        self.leave(LINGER);
    }
}

impl Store for TcpStore {
    fn set(&self, key: &str, value: &[u8]) -> smddp_core::Result<()> {
        check(key, value.len())?;
        let (status, body) = self.ask(Op::Set, 0, key, value, Instant::now())?;
        Ok(self.expect_ok(status, &body, key)?)
    }

    fn get(&self, key: &str, deadline: Instant) -> smddp_core::Result<Vec<u8>> {
        check(key, 0)?;
        let start = Instant::now();
        let (status, body) = self.ask(Op::Get, milliseconds(deadline), key, &[], deadline)?;
        if status == Status::Timeout {
            return Err(Error::Timeout { key: key.to_owned(), waited: start.elapsed() }.into());
        }
        self.expect_ok(status, &body, key)?;
        Ok(body)
    }

    fn add(&self, key: &str, amount: i64) -> smddp_core::Result<i64> {
        check(key, 0)?;
        let (status, body) = self.ask(Op::Add, amount, key, &[], Instant::now())?;
        self.expect_ok(status, &body, key)?;
        match <[u8; 8]>::try_from(body.as_slice()) {
            Ok(bytes) => Ok(i64::from_le_bytes(bytes)),
            Err(_) => Err(self.lost(key, "an answer of the wrong length").into()),
        }
    }
}

fn check(key: &str, length: usize) -> Result<()> {
    kv::check(key, length).map_err(|reason| Error::Refused { key: key.to_owned(), reason })
}

fn milliseconds(deadline: Instant) -> i64 {
    deadline.saturating_duration_since(Instant::now()).as_millis().min(1 << 40) as i64
}

fn bind(addresses: &[IpAddr], port: u16) -> std::io::Result<TcpListener> {
    let all: Vec<SocketAddr> = addresses.iter().map(|&ip| SocketAddr::new(ip, port)).collect();
    let mut last = None;
    for address in all {
        match listen(address) {
            Ok(listener) => return Ok(listener),
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => return Err(error),
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| std::io::Error::other("no address to listen on")))
}

/// As [`TcpListener::bind`]; what listens on IPv6's wildcard takes IPv4 too, whatever `net.ipv6.bindv6only` says.
fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    if address.is_ipv4() {
        return TcpListener::bind(address);
    }
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::INET6,
        rustix::net::SocketType::STREAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?;
    rustix::net::sockopt::set_socket_reuseaddr(&socket, true)?;
    rustix::net::sockopt::set_ipv6_v6only(&socket, false)?;
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(TcpListener::from(socket))
}

/// When a port is taken: by another rank 0 of this very job? Then both have to know.
fn refuse_twin(identity: Identity, process: u64, port: u16, deadline: Instant) -> Result<()> {
    let address = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
    match attempt_each(identity, process, &[address], deadline.min(Instant::now() + TWIN_TIME)) {
        Err(Attempt::Fatal(error @ Error::Disagree { .. })) => Err(error),
        // Another program, another job, or our own last store that is ending.
        Ok(_) | Err(_) => Ok(()),
    }
}

/// How one attempt to reach the store ended.
#[derive(Debug)]
enum Attempt {
    /// Trying again cannot help.
    Fatal(Error),
    Again(String),
}

impl From<std::io::Error> for Attempt {
    fn from(error: std::io::Error) -> Attempt {
        Attempt::Again(error.to_string())
    }
}

/// An address rank 0's store may have.
struct Candidate {
    /// As it was given.
    text: String,
    port: u16,
    /// Why the last attempt failed.
    reason: String,
}

impl Candidate {
    fn failed(&mut self, reason: &str) {
        // The last round may have no time left: what an earlier one learnt says more.
        if self.reason.is_empty() || ![NO_ANSWER, lookup::NOT_YET].contains(&reason) {
            reason.clone_into(&mut self.reason);
        }
    }
}

/// Candidates of one host, whose name is looked up once a round for all of them.
struct CandidateHost {
    lookup: Lookup,
    candidates: Vec<Candidate>,
}

impl CandidateHost {
    /// From "host:port" each.
    fn all(candidates: &[String], resolver: &Resolver) -> Result<Vec<CandidateHost>> {
        let mut hosts: Vec<CandidateHost> = Vec::new();
        for text in candidates {
            let (name, port) = host_and_port(text).ok_or_else(|| Error::NoWay {
                what: format!("'{text}' is no address of a store"),
                hint: "Give a host's name or address, a colon, and a port".to_owned(),
            })?;
            let candidate = Candidate { text: text.clone(), port, reason: String::new() };
            match hosts.iter_mut().find(|host| host.lookup.name() == name) {
                Some(host) => host.candidates.push(candidate),
                None => hosts
                    .push(CandidateHost { lookup: Lookup::new(name, resolver), candidates: vec![candidate] }),
            }
        }
        Ok(hosts)
    }

    /// Tries each candidate for up to `patience`, after a wait for the host's addresses that is as long at most. `None`:
    /// none of them now.
    fn attempt(
        &mut self,
        identity: Identity,
        process: u64,
        patience: Duration,
        deadline: Instant,
    ) -> Result<Option<(TcpStream, SocketAddr)>> {
        let limit = || deadline.min(Instant::now() + patience);
        let mut addresses = match self.lookup.addresses(limit()) {
            Ok(addresses) => addresses,
            Err(error) => {
                self.candidates.iter_mut().for_each(|candidate| candidate.failed(&error.to_string()));
                return Ok(None);
            }
        };
        for candidate in &mut self.candidates {
            if interrupt::came() {
                return Ok(None);
            }
            addresses.iter_mut().for_each(|address| address.set_port(candidate.port));
            match attempt_each(identity, process, &addresses, limit()) {
                Ok(reached) => return Ok(Some(reached)),
                Err(Attempt::Fatal(error)) => return Err(error),
                Err(Attempt::Again(reason)) => candidate.failed(&reason),
            }
        }
        Ok(None)
    }
}

/// The parts of "host:port" or "[address]:port".
fn host_and_port(candidate: &str) -> Option<(&str, u16)> {
    let (host, port) = candidate.rsplit_once(':')?;
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    Some((host, port.parse().ok()?))
}

/// Tries the addresses of one host in turn. Each has its share of the time that is left: one that swallows packets leaves
/// some to the next.
fn attempt_each(
    identity: Identity,
    process: u64,
    addresses: &[SocketAddr],
    limit: Instant,
) -> std::result::Result<(TcpStream, SocketAddr), Attempt> {
    let mut last = Attempt::Again(NO_ANSWER.to_owned());
    for (at, &address) in addresses.iter().enumerate() {
        let now = Instant::now();
        let limit = now + limit.saturating_duration_since(now) / (addresses.len() - at) as u32;
        let result = dial(address, limit)
            .map_err(Attempt::from)
            .and_then(|mut stream| greet(&mut stream, identity, process, limit).map(|()| stream));
        match result {
            Ok(stream) => return Ok((stream, address)),
            Err(fatal @ Attempt::Fatal(_)) => return Err(fatal),
            Err(again) => last = again,
        }
    }
    Err(last)
}

fn greet(
    stream: &mut TcpStream,
    identity: Identity,
    process: u64,
    limit: Instant,
) -> std::result::Result<(), Attempt> {
    stream.set_nodelay(true)?;
    keep_alive(stream);
    let (rank, size) = (identity.rank as u32, identity.size as u32);
    send(stream, &Hello { secret: identity.secret, size, rank, process }.encode(), limit)?;
    let mut magic = [0; MAGIC.len()];
    receive(stream, &mut magic, limit)?;
    if magic != MAGIC {
        return Err(Attempt::Again("another program listens there".to_owned()));
    }
    let (status, body) = receive_reply(stream, limit)?;
    let text = String::from_utf8_lossy(&body).into_owned();
    match status {
        Status::Ok => Ok(()),
        Status::Disagree => Err(Attempt::Fatal(Error::Disagree { what: text })),
        Status::Refused => Err(Attempt::Fatal(Error::Refused { key: "hello".to_owned(), reason: text })),
        Status::Stranger | Status::Ending | Status::Timeout => Err(Attempt::Again(text)),
    }
}

fn send(stream: &mut TcpStream, mut bytes: &[u8], limit: Instant) -> std::io::Result<()> {
    while !bytes.is_empty() {
        stream.set_write_timeout(Some(left(limit)?))?;
        match stream.write(bytes) {
            Ok(0) => return Err(std::io::ErrorKind::WriteZero.into()),
            Ok(n) => bytes = &bytes[n..],
            Err(error) => again(error)?,
        }
    }
    Ok(())
}

fn receive(stream: &mut TcpStream, mut bytes: &mut [u8], limit: Instant) -> std::io::Result<()> {
    while !bytes.is_empty() {
        stream.set_read_timeout(Some(interrupt::slice(left(limit)?)))?;
        match stream.read(bytes) {
            Ok(0) => {
                return Err(std::io::Error::new(
                    std::io::ErrorKind::UnexpectedEof,
                    "the other side closed the connection",
                ));
            }
            Ok(n) => bytes = &mut bytes[n..],
            Err(_) if interrupt::came() => return Err(std::io::Error::other("the wait was interrupted")),
            Err(error) => again(error)?,
        }
    }
    Ok(())
}

fn receive_reply(stream: &mut TcpStream, limit: Instant) -> std::io::Result<(Status, Vec<u8>)> {
    let mut header = [0; REPLY];
    receive(stream, &mut header, limit)?;
    let (status, length) = wire::parse_reply(&header)
        .ok_or_else(|| std::io::Error::new(std::io::ErrorKind::InvalidData, "not an answer of our store"))?;
    let mut body = vec![0; length];
    receive(stream, &mut body, limit)?;
    Ok((status, body))
}

/// The time left, an error when there is none.
fn left(limit: Instant) -> std::io::Result<Duration> {
    let left = limit.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(std::io::Error::new(std::io::ErrorKind::TimedOut, NO_ANSWER));
    }
    Ok(left)
}

/// Lets interruptions and the socket's own time-outs pass: [`left`] decides when to stop.
fn again(error: std::io::Error) -> std::io::Result<()> {
    match error.kind() {
        std::io::ErrorKind::Interrupted | std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => {
            Ok(())
        }
        _ => Err(error),
    }
}

/// What was wrong with each candidate; what several have in common is said once.
fn summary<'a>(candidates: impl Iterator<Item = &'a Candidate>) -> String {
    let mut groups: Vec<(&str, Vec<&str>)> = Vec::new();
    for Candidate { text, reason, .. } in candidates {
        match groups.iter_mut().find(|(known, _)| known == reason) {
            Some((_, texts)) => texts.push(text),
            None => groups.push((reason, vec![text])),
        }
    }
    let list: Vec<String> =
        groups.iter().map(|(reason, texts)| format!("{}: {reason}", texts.join(", "))).collect();
    list.join("; ")
}

/// A secret of this process's own making.
pub(crate) fn random_secret() -> Secret {
    let mut secret = [0; 16];
    secret[..8].copy_from_slice(&host::random_u64().to_le_bytes());
    secret[8..].copy_from_slice(&host::random_u64().to_le_bytes());
    secret
}

#[cfg(test)]
#[path = "tcp_store_tests.rs"]
mod tests;
