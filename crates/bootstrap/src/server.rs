//! Rank 0's side of the TCP store: one thread that polls all connections.
//!
//! Invariants:
//! 1. No byte of a connection is believed before its hello proved magic and secret; a connection that says
//!    anything else, or nothing for [`HELLO_TIME`], is closed without an answer. At most [`MOST_STRANGERS`]
//!    such connections are kept.
//! 2. A connection has at most one request under way; its memory is bounded by one request and one reply.
//! 3. Until every rank has come, a contradiction (two processes of one rank, another world size, a rank that
//!    left) fails the job for all. Afterwards it only turns the newcomer away. A connection that ends before it asked
//!    anything is no rank that left: its client may have given up waiting for the greeting, and will come again.
//! 4. The thread ends when it was told to and every rank has left, or at the time it was given.
//! 5. There is a descriptor for every rank's connection, and some for those of its threads that wait: else it is not
//!    started (`descriptors`).

use std::collections::{BTreeMap, HashMap};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::{set_socket_keepalive, set_tcp_keepidle, set_tcp_keepintvl};
use smddp_core::interrupt;

use crate::kv::Table;
use crate::wire::{self, HELLO, Hello, Op, Request, Secret, Status};

/// A connection must have said hello by then.
const HELLO_TIME: Duration = Duration::from_secs(10);
/// Connections that have not said hello; the oldest makes room for the next.
const MOST_STRANGERS: usize = 512;
/// Connections of one rank: each thread that waits has one.
const MOST_PER_RANK: usize = 256;
/// How long the listener rests when the process has no descriptor left.
const ACCEPT_REST: Duration = Duration::from_millis(50);
/// Pending connections the kernel keeps: a whole job may come at once.
pub(crate) const BACKLOG: i32 = 4096;

/// How long a connection may be silent before the kernel asks whether the other side is there, and how often it asks again.
/// Linux's own 2 hours are too long for firewalls, many of which forget a silent connection after some minutes.
const KEEP_ALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(15);

/// Keeps a connection that is silent for hours of training in the memory of firewalls. Without it, it still works where
/// there are none.
pub(crate) fn keep_alive(stream: &TcpStream) {
    let kept = set_socket_keepalive(stream, true)
        .and_then(|()| set_tcp_keepidle(stream, KEEP_ALIVE_IDLE))
        .and_then(|()| set_tcp_keepintvl(stream, KEEP_ALIVE_EVERY));
    if let Err(error) = kept {
        tracing::debug!("a connection of the store is not kept alive: {error}");
    }
}

/// What [`keep_alive`] has set.
#[cfg(test)]
pub(crate) fn assert_kept_alive(stream: &TcpStream) {
    use rustix::net::sockopt::{socket_keepalive, tcp_keepidle, tcp_keepintvl};
    assert!(socket_keepalive(stream).unwrap());
    assert_eq!(tcp_keepidle(stream).unwrap(), Duration::from_secs(60));
    assert_eq!(tcp_keepintvl(stream).unwrap(), Duration::from_secs(15));
}

/// The running server. Dropping it without [`Server::stop`] ends it at once.
#[derive(Debug)]
pub(crate) struct Server {
    thread: Option<JoinHandle<()>>,
    wake: UnixStream,
    /// `Some(t)`: end when every rank has left, at `t` at the latest.
    stop: Arc<Mutex<Option<Instant>>>,
    /// Closes when the thread ends.
    ended: Mutex<Receiver<()>>,
    port: u16,
}

impl Server {
    /// Serves `listener` for the job of `size` ranks with this `secret`; `process` is rank 0's own number.
    pub(crate) fn start(
        listener: TcpListener,
        size: usize,
        secret: Secret,
        process: u64,
    ) -> std::io::Result<Server> {
        listener.set_nonblocking(true)?;
        // A second listen() only changes the backlog.
        rustix::net::listen(&listener, BACKLOG)?;
        let port = listener.local_addr()?.port();
        let (wake, woken) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        woken.set_nonblocking(true)?;
        let stop = Arc::new(Mutex::new(None));
        let mut state = State::new(size, secret, Arc::clone(&stop));
        state.members[0].process = Some(process);
        let (ends, ended) = channel();
        let thread = std::thread::Builder::new().name("smddp-store".to_owned()).spawn(move || {
            let _ends: Sender<()> = ends;
            state.run(&listener, &woken);
        })?;
        Ok(Server { thread: Some(thread), wake, stop, ended: Mutex::new(ended), port })
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Ends the server once every rank has left, at `deadline` at the latest, or at an [`interrupt`].
    pub(crate) fn stop(mut self, deadline: Instant) {
        self.end(deadline);
    }

    fn end(&mut self, deadline: Instant) {
        if let Some(thread) = self.thread.take() {
            self.stop_at(deadline);
            let ended = self.ended.get_mut().unwrap_or_else(PoisonError::into_inner);
            while ended.recv_timeout(interrupt::EVERY) == Err(RecvTimeoutError::Timeout) {
                if interrupt::came() {
                    self.stop_at(Instant::now());
                    break;
                }
            }
            if thread.join().is_err() {
                tracing::error!("the store's thread panicked; please report it");
            }
        }
    }

    fn stop_at(&self, deadline: Instant) {
        *self.stop.lock().unwrap_or_else(PoisonError::into_inner) = Some(deadline);
        // A full pipe means that a wake-up is on its way already.
        let _ = (&self.wake).write(&[1]);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end(Instant::now());
    }
}

/// What is known of a rank.
#[derive(Clone, Debug, Default)]
struct Member {
    process: Option<u64>,
    address: Option<SocketAddr>,
    connections: usize,
    left: bool,
}

/// A request that waits.
#[derive(Debug)]
enum Wait {
    Key { key: String, until: Instant },
    Ready { until: Instant },
}

impl Wait {
    fn until(&self) -> Instant {
        match self {
            Wait::Key { until, .. } | Wait::Ready { until } => *until,
        }
    }
}

/// Bytes on their way to a client: a short head and a body shared with the table.
#[derive(Debug)]
struct Outgoing {
    head: Vec<u8>,
    body: Arc<[u8]>,
    sent: usize,
}

#[derive(Debug)]
struct Conn {
    stream: TcpStream,
    address: SocketAddr,
    since: Instant,
    rank: Option<usize>,
    input: Vec<u8>,
    output: Option<Outgoing>,
    wait: Option<Wait>,
    /// A request came, thus the greeting was read (invariant 3).
    asked: bool,
    /// Close once the output is out.
    closing: bool,
}

/// Why a connection is closed without more words.
enum Close {
    Gone,
    Garbage(&'static str),
}

struct State {
    size: usize,
    secret: Secret,
    stop: Arc<Mutex<Option<Instant>>>,
    conns: BTreeMap<u64, Conn>,
    next: u64,
    table: Table,
    members: Vec<Member>,
    /// Connections waiting for a key.
    waiting: HashMap<String, Vec<u64>>,
    /// Every rank has said hello once.
    ready: bool,
    failed: Option<String>,
    rest_until: Option<Instant>,
}

impl State {
    fn new(size: usize, secret: Secret, stop: Arc<Mutex<Option<Instant>>>) -> State {
        State {
            size,
            secret,
            stop,
            conns: BTreeMap::new(),
            next: 0,
            table: Table::default(),
            members: vec![Member::default(); size],
            waiting: HashMap::new(),
            ready: false,
            failed: None,
            rest_until: None,
        }
    }

    fn stop_at(&self) -> Option<Instant> {
        *self.stop.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&mut self, listener: &TcpListener, woken: &UnixStream) {
        loop {
            let now = Instant::now();
            let stop = self.stop_at();
            if let Some(end) = stop {
                let alive = self.members.iter().filter(|m| m.connections > 0).count();
                if alive == 0 || now >= end {
                    if alive > 0 {
                        tracing::warn!("the store ends while {alive} ranks still use it");
                    }
                    return;
                }
            }
            self.expire(now);
            let (accept, wake, ready) = match self.poll(listener, woken, stop) {
                Ok(events) => events,
                Err(error) => {
                    tracing::error!("the store cannot poll its connections: {error}");
                    return;
                }
            };
            if wake {
                let mut sink = [0u8; 64];
                let _ = (&*woken).read(&mut sink);
            }
            for id in ready {
                self.serve(id);
            }
            if accept {
                self.accept(listener);
            }
        }
    }

    /// Sleeps until something happens: (a connection comes, somebody woke us, connections to serve).
    fn poll(
        &self,
        listener: &TcpListener,
        woken: &UnixStream,
        stop: Option<Instant>,
    ) -> std::io::Result<(bool, bool, Vec<u64>)> {
        let now = Instant::now();
        let resting = self.rest_until.is_some_and(|t| t > now);
        let listen = if resting { PollFlags::empty() } else { PollFlags::IN };
        let mut fds = vec![PollFd::new(woken, PollFlags::IN), PollFd::new(listener, listen)];
        let mut ids = Vec::with_capacity(self.conns.len());
        for (&id, conn) in &self.conns {
            let mut flags = PollFlags::IN;
            if conn.output.is_some() {
                flags |= PollFlags::OUT;
            }
            fds.push(PollFd::new(&conn.stream, flags));
            ids.push(id);
        }
        let until = self.next_deadline(stop);
        let timeout = until.map(|t| {
            let left = t.saturating_duration_since(now) + Duration::from_millis(1);
            Timespec { tv_sec: left.as_secs().min(1 << 30) as i64, tv_nsec: i64::from(left.subsec_nanos()) }
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready = ids.into_iter().zip(&fds[2..]).filter(|(_, fd)| !fd.revents().is_empty());
        let ready = ready.map(|(id, _)| id).collect();
        Ok((!fds[1].revents().is_empty(), !fds[0].revents().is_empty(), ready))
    }

    fn next_deadline(&self, stop: Option<Instant>) -> Option<Instant> {
        let waits = self.conns.values().filter_map(|conn| match (&conn.wait, conn.rank) {
            (Some(wait), _) => Some(wait.until()),
            (None, None) => Some(conn.since + HELLO_TIME),
            (None, Some(_)) => None,
        });
        waits.chain(stop).chain(self.rest_until).min()
    }

    /// Answers waits whose time is over and closes connections that never said hello.
    fn expire(&mut self, now: Instant) {
        if self.rest_until.is_some_and(|t| t <= now) {
            self.rest_until = None;
        }
        let over: Vec<u64> = self
            .conns
            .iter()
            .filter(|(_, conn)| match (&conn.wait, conn.rank) {
                (Some(wait), _) => wait.until() <= now,
                (None, None) => conn.since + HELLO_TIME <= now,
                (None, Some(_)) => false,
            })
            .map(|(&id, _)| id)
            .collect();
        for id in over {
            let wait = self.conns.get_mut(&id).and_then(|conn| conn.wait.take());
            match wait {
                None => self.close(id, &Close::Garbage("it never said hello")),
                Some(Wait::Key { key, .. }) => {
                    self.forget_wait(&key, id);
                    self.reply(id, Status::Timeout, Arc::from([]));
                }
                Some(Wait::Ready { .. }) => {
                    let missing = self.absent();
                    let bytes: Vec<u8> = missing.iter().flat_map(|&r| (r as u32).to_le_bytes()).collect();
                    self.reply(id, Status::Timeout, Arc::from(bytes));
                }
            }
        }
    }

    fn absent(&self) -> Vec<usize> {
        (0..self.size).filter(|&r| self.members[r].connections == 0).collect()
    }

    fn forget_wait(&mut self, key: &str, id: u64) {
        if let Some(ids) = self.waiting.get_mut(key) {
            ids.retain(|&other| other != id);
            if ids.is_empty() {
                self.waiting.remove(key);
            }
        }
    }

    fn accept(&mut self, listener: &TcpListener) {
        loop {
            match listener.accept() {
                Ok((stream, address)) => {
                    if stream.set_nonblocking(true).is_err() {
                        continue;
                    }
                    let _ = stream.set_nodelay(true);
                    keep_alive(&stream);
                    self.make_room();
                    self.conns.insert(
                        self.next,
                        Conn {
                            stream,
                            address,
                            since: Instant::now(),
                            rank: None,
                            input: Vec::new(),
                            output: None,
                            wait: None,
                            asked: false,
                            closing: false,
                        },
                    );
                    self.next += 1;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                // The peer gave up before we looked.
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    tracing::warn!("the store cannot accept a connection now: {error}");
                    self.rest_until = Some(Instant::now() + ACCEPT_REST);
                    return;
                }
            }
        }
    }

    fn make_room(&mut self) {
        let mut strangers = self.conns.iter().filter(|(_, c)| c.rank.is_none()).map(|(&id, _)| id);
        // Ids grow, so the first is the oldest.
        if let Some(oldest) = strangers.next()
            && strangers.count() + 1 >= MOST_STRANGERS
        {
            self.close(oldest, &Close::Garbage("too many connections without a hello"));
        }
    }

    /// Moves bytes of one connection, both ways, and acts on what is complete.
    fn serve(&mut self, id: u64) {
        if let Err(why) = self.flush(id).and_then(|()| self.fill(id)).and_then(|()| self.digest(id)) {
            self.close(id, &why);
        }
    }

    fn flush(&mut self, id: u64) -> Result<(), Close> {
        let Some(conn) = self.conns.get_mut(&id) else { return Ok(()) };
        let Some(out) = &mut conn.output else { return Ok(()) };
        let total = out.head.len() + out.body.len();
        while out.sent < total {
            let rest = match out.head.get(out.sent..) {
                Some(head) if !head.is_empty() => head,
                _ => &out.body[out.sent - out.head.len()..],
            };
            match (&conn.stream).write(rest) {
                Ok(0) => return Err(Close::Gone),
                Ok(n) => out.sent += n,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => return Err(Close::Gone),
            }
        }
        conn.output = None;
        if conn.closing { Err(Close::Gone) } else { Ok(()) }
    }

    fn fill(&mut self, id: u64) -> Result<(), Close> {
        let Some(conn) = self.conns.get_mut(&id) else { return Ok(()) };
        let mut buffer = [0u8; 16384];
        loop {
            match (&conn.stream).read(&mut buffer) {
                Ok(0) => return Err(Close::Gone),
                Ok(_) if conn.closing => return Ok(()),
                Ok(_) if conn.wait.is_some() || conn.output.is_some() => {
                    return Err(Close::Garbage("it spoke before its answer came"));
                }
                Ok(n) => conn.input.extend_from_slice(&buffer[..n]),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => return Err(Close::Gone),
            }
            // Look at what came before taking more, so that garbage is not collected (invariants 1 and 2).
            if conn.rank.is_none() {
                match Hello::decode(&conn.input) {
                    Err(()) => return Err(Close::Garbage("it does not speak our protocol")),
                    Ok(Some(_)) => return Ok(()),
                    Ok(None) => {}
                }
            } else {
                match Request::decode(&conn.input) {
                    Err(what) => return Err(Close::Garbage(what)),
                    Ok(Some(_)) => return Ok(()),
                    Ok(None) => {}
                }
            }
        }
    }

    fn digest(&mut self, id: u64) -> Result<(), Close> {
        let Some(conn) = self.conns.get_mut(&id) else { return Ok(()) };
        if conn.closing || conn.output.is_some() || conn.wait.is_some() {
            return Ok(());
        }
        if conn.rank.is_none() {
            return match Hello::decode(&conn.input) {
                Err(()) => Err(Close::Garbage("it does not speak our protocol")),
                Ok(None) => Ok(()),
                Ok(Some(hello)) => {
                    conn.input.drain(..HELLO);
                    self.greet(id, hello);
                    Ok(())
                }
            };
        }
        match Request::decode(&conn.input) {
            Err(what) => Err(Close::Garbage(what)),
            Ok(None) => Ok(()),
            Ok(Some((_, length))) if length != conn.input.len() => {
                Err(Close::Garbage("it spoke before its answer came"))
            }
            Ok(Some((request, _))) => {
                conn.input.clear();
                conn.asked = true;
                self.act(id, request);
                Ok(())
            }
        }
    }

    /// Judges a hello (invariant 3).
    fn greet(&mut self, id: u64, hello: Hello) {
        let address = match self.conns.get(&id) {
            Some(conn) => conn.address,
            None => return,
        };
        if hello.secret != self.secret {
            let why = "this store serves another job, with another MASTER_PORT or launcher's id";
            return self.turn_away(id, Status::Stranger, why);
        }
        let rank = hello.rank as usize;
        if hello.size as usize != self.size || rank >= self.size {
            let what = format!(
                "rank {rank} at {address} says the job has {} ranks, rank 0 says {}",
                hello.size, self.size
            );
            return self.contradict(id, what);
        }
        let member = &self.members[rank];
        match member.process {
            _ if self.stop_at().is_some() => self.turn_away(id, Status::Ending, "this store is ending"),
            None => self.admit(id, rank, hello.process, address),
            Some(process) if process == hello.process && member.connections < MOST_PER_RANK => {
                self.admit(id, rank, hello.process, address);
            }
            Some(process) if process == hello.process => {
                self.turn_away(id, Status::Refused, "this rank has too many connections");
            }
            Some(_) if member.left => self.turn_away(id, Status::Ending, "this rank has left this store"),
            Some(_) => {
                let first = member.address.map_or_else(|| "rank 0's host".to_owned(), |a| a.to_string());
                self.contradict(
                    id,
                    format!(
                        "two processes say they are rank {rank}: one at {first}, one at {address}. Give each its own RANK, \
                         and each job on a host its own MASTER_PORT"
                    ),
                );
            }
        }
    }

    fn admit(&mut self, id: u64, rank: usize, process: u64, address: SocketAddr) {
        let member = &mut self.members[rank];
        member.process = Some(process);
        member.address = Some(address);
        member.connections += 1;
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.rank = Some(rank);
        }
        match self.failed.clone() {
            Some(what) => self.turn_away(id, Status::Disagree, &what),
            None => self.greeting(id, Status::Ok, &[]),
        }
        if !self.ready && self.failed.is_none() && self.members.iter().all(|m| m.connections > 0) {
            self.ready = true;
            let waiters: Vec<u64> = self
                .conns
                .iter()
                .filter(|(_, c)| matches!(c.wait, Some(Wait::Ready { .. })))
                .map(|(&id, _)| id)
                .collect();
            for waiter in waiters {
                self.reply(waiter, Status::Ok, Arc::from([]));
            }
        }
    }

    fn contradict(&mut self, id: u64, what: String) {
        tracing::error!("{what}");
        self.turn_away(id, Status::Disagree, &what);
        if !self.ready {
            self.fail(what);
        }
    }

    /// Fails the job: everybody who waits, now or later, is told.
    fn fail(&mut self, what: String) {
        if self.failed.is_some() {
            return;
        }
        let waiters: Vec<u64> =
            self.conns.iter().filter(|(_, c)| c.wait.is_some()).map(|(&id, _)| id).collect();
        for id in waiters {
            self.reply(id, Status::Disagree, Arc::from(what.as_bytes()));
        }
        self.waiting.clear();
        self.failed = Some(what);
    }

    /// The answer to a hello: the magic before the reply.
    fn greeting(&mut self, id: u64, status: Status, body: &[u8]) {
        let mut head = wire::MAGIC.to_vec();
        head.extend(wire::reply_header(status, body.len()));
        self.send(id, head, Arc::from(body));
    }

    fn turn_away(&mut self, id: u64, status: Status, why: &str) {
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.closing = true;
        }
        self.greeting(id, status, why.as_bytes());
    }

    fn reply(&mut self, id: u64, status: Status, body: Arc<[u8]>) {
        let head = wire::reply_header(status, body.len()).to_vec();
        self.send(id, head, body);
    }

    fn send(&mut self, id: u64, head: Vec<u8>, body: Arc<[u8]>) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        conn.wait = None;
        conn.output = Some(Outgoing { head, body, sent: 0 });
        if let Err(why) = self.flush(id) {
            self.close(id, &why);
        }
    }

    fn act(&mut self, id: u64, request: Request) {
        if let (Some(what), true) = (&self.failed, request.op != Op::Goodbye) {
            let what = Arc::from(what.as_bytes());
            return self.reply(id, Status::Disagree, what);
        }
        let until = Instant::now() + Duration::from_millis(request.number.clamp(0, 1 << 40) as u64);
        let refuse = |why: String| (Status::Refused, Arc::from(why.as_bytes()));
        let (status, body) = match request.op {
            Op::Set => match self.table.set(&request.key, &request.value) {
                Ok(()) => (Status::Ok, Arc::from([])),
                Err(why) => refuse(why),
            },
            Op::Add => match self.table.add(&request.key, request.number) {
                Ok(new) => (Status::Ok, Arc::from(new.to_le_bytes())),
                Err(why) => refuse(why),
            },
            Op::Get => match self.table.get(&request.key) {
                Some(value) => (Status::Ok, value),
                None => {
                    self.waiting.entry(request.key.clone()).or_default().push(id);
                    return self.park(id, Wait::Key { key: request.key, until });
                }
            },
            Op::Ready if self.ready => (Status::Ok, Arc::from([])),
            Op::Ready => return self.park(id, Wait::Ready { until }),
            Op::Goodbye => {
                self.leave(id);
                (Status::Ok, Arc::from([]))
            }
        };
        self.reply(id, status, body);
        if matches!(request.op, Op::Set | Op::Add) && status == Status::Ok {
            self.wake(&request.key);
        }
    }

    fn park(&mut self, id: u64, wait: Wait) {
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.wait = Some(wait);
        }
    }

    /// Answers those who wait for `key`.
    fn wake(&mut self, key: &str) {
        let Some(value) = self.table.get(key) else { return };
        for id in self.waiting.remove(key).unwrap_or_default() {
            self.reply(id, Status::Ok, Arc::clone(&value));
        }
    }

    fn leave(&mut self, id: u64) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        conn.closing = true;
        let Some(rank) = conn.rank else { return };
        self.members[rank].left = true;
        if !self.ready {
            self.fail(format!("rank {rank} gave up before every rank had come"));
        }
    }

    fn close(&mut self, id: u64, why: &Close) {
        let Some(conn) = self.conns.remove(&id) else { return };
        match why {
            Close::Gone => {}
            Close::Garbage(what) => tracing::debug!("closed a connection of {}: {what}", conn.address),
        }
        if let Some(Wait::Key { key, .. }) = &conn.wait {
            self.forget_wait(key, id);
        }
        let Some(rank) = conn.rank else { return };
        let member = &mut self.members[rank];
        member.connections -= 1;
        if member.connections == 0 && conn.asked && !member.left && !self.ready {
            self.fail(format!("rank {rank} at {} ended before every rank had come", conn.address));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_connection_is_kept_in_the_firewalls_memory() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        listener.set_nonblocking(true).unwrap();
        let mut state = State::new(1, [0; 16], Arc::new(Mutex::new(None)));
        let limit = Instant::now() + Duration::from_secs(60);
        while state.conns.is_empty() && Instant::now() < limit {
            state.accept(&listener);
        }
        assert_kept_alive(&state.conns[&0].stream);
    }
}
