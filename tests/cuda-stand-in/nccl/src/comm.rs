//! A communicator as one rank holds it: its connection, the order of its operations, its error.

use crate::driver::{self, Parked};
use crate::error::{self, Code, Error, Result, lock};
use crate::operation::Operation;
use crate::wire::{self, Hello, Reply, Request};
use crate::{group, server};
use smddp_standin::switches::{Connect, PeerLoss, Switches};
use std::collections::{BTreeMap, HashMap};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

#[derive(Default)]
struct State {
    /// Ready, or refused.
    joined: Option<Result>,
    replies: HashMap<u64, (Reply, Vec<u8>)>,
    lost: bool,
    aborted: bool,
    error: Option<Error>,
    /// Operations queued, and done: the next to run is the one with number `done`.
    queued: u64,
    done: u64,
    /// A thread of our own has yet to queue what the last call of a communicator that does not block gave.
    launching: bool,
    /// Graphs that hold operations: each keeps the communicator from ending.
    graphs: Vec<u64>,
}

pub struct Comm {
    pub rank: usize,
    pub ranks: usize,
    pub device: i32,
    /// Else calls go on in a thread of their own, and answer ncclInProgress.
    is_blocking: bool,
    /// Calls that are being made.
    inside: AtomicUsize,
    server: String,
    to: Mutex<UnixStream>,
    closer: UnixStream,
    state: Mutex<State>,
    changed: Condvar,
    /// Taken while an operation gets its number and its place in a stream.
    order: Mutex<()>,
    next_id: AtomicU64,
    /// Reductions with a scalar: element type and where the scalar is.
    pub scalars: Mutex<BTreeMap<i32, (i32, Scalar)>>,
    pub registered: Mutex<BTreeMap<usize, (usize, usize)>>,
}

#[derive(Clone, Copy, Debug)]
pub enum Scalar {
    Immediate([u8; 8]),
    Device(usize),
}

/// What the thread of a call that does not block takes for it: time to be seen as ncclInProgress.
const LAUNCH_TIME: Duration = Duration::from_millis(2);
/// Aborts while a thread is in a call of a communicator that blocks count as calls of this name.
const ABORTED_INSIDE: &str = "abort inside a call";

/// Looks at what NCCL's own threads found beside the calls count as calls of this name.
const PROXY: &str = "proxy";

/// Live communicators by handle, which is never an address.
static COMMS: Mutex<BTreeMap<usize, Arc<Comm>>> = Mutex::new(BTreeMap::new());

pub fn find(handle: usize, function: &str) -> Result<Arc<Comm>> {
    if handle == 0 {
        return Err(Error::new(Code::INVALID_ARGUMENT, format!("{function} : comm argument is NULL")));
    }
    lock(&COMMS).get(&handle).cloned().ok_or_else(|| {
        let text = format!("{function} : comm {handle:#x} is no communicator, or was destroyed");
        Error::new(Code::INVALID_ARGUMENT, text)
    })
}

pub fn enlist(comm: &Arc<Comm>) -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0x7100);
    let handle = NEXT.fetch_add(0x10, Ordering::Relaxed);
    lock(&COMMS).insert(handle, Arc::clone(comm));
    handle
}

pub fn strike(handle: usize) {
    let mut comms = lock(&COMMS);
    comms.remove(&handle);
    tell_count(&comms);
}

/// Those whose ranks have not all come are none yet.
fn tell_count(comms: &BTreeMap<usize, Arc<Comm>>) {
    driver::tell_communicators(comms.values().filter(|comm| comm.has_joined() == Some(Ok(()))).count());
}

/// As NCCL tells hosts apart.
fn host() -> String {
    std::env::var("NCCL_HOSTID").unwrap_or_else(|_| "this".into())
}

/// Whether operations that need a rank which left fail, or wait for it until they are aborted.
fn notices_loss() -> bool {
    Switches::get().peer_loss == PeerLoss::Error
}

fn system(what: &str, why: impl std::fmt::Display) -> Error {
    Error::new(Code::SYSTEM, format!("{what}: {why}"))
}

/// Where a communicator is: the server's name, and which of its rooms.
pub struct Place {
    pub server: String,
    pub room: u64,
}

impl Comm {
    /// Connects; [`Comm::wait_joined`] says when all ranks are there.
    pub fn join(
        place: Place,
        rank: usize,
        ranks: usize,
        device: i32,
        is_blocking: bool,
    ) -> Result<Arc<Self>> {
        let address = server::address(&place.server).map_err(|why| system("bad unique id", why))?;
        let stream =
            UnixStream::connect_addr(&address).map_err(|why| system("the server of the unique id", why))?;
        let hello = Hello {
            room: place.room,
            rank,
            ranks,
            version: Switches::get().nccl_version,
            host: host(),
            device,
            process: std::process::id(),
        };
        wire::send(&stream, &Request::Hello(hello), &[]).map_err(|why| system("greeting", why))?;
        let from = stream.try_clone().map_err(|why| system("socket", why))?;
        let closer = stream.try_clone().map_err(|why| system("socket", why))?;
        let comm = Arc::new(Self {
            rank,
            ranks,
            device,
            is_blocking,
            inside: AtomicUsize::new(0),
            server: place.server,
            to: Mutex::new(stream),
            closer,
            state: Mutex::default(),
            changed: Condvar::new(),
            order: Mutex::default(),
            next_id: AtomicU64::new(0),
            scalars: Mutex::default(),
            registered: Mutex::default(),
        });
        let reading = Arc::clone(&comm);
        std::thread::Builder::new()
            .name("standin-nccl-comm".into())
            .spawn(move || reading.read_replies(&from))
            .map_err(|why| system("thread", why))?;
        Ok(comm)
    }

    fn read_replies(&self, from: &UnixStream) {
        loop {
            let received = wire::receive::<Reply>(from);
            let mut state = lock(&self.state);
            match received {
                Ok((Reply::Ready, _)) => state.joined = Some(Ok(())),
                Ok((Reply::Refused(error), _)) => drop(state.joined.get_or_insert(Err(error))),
                Ok((reply, bytes)) => {
                    if let Reply::Done { id } | Reply::Split { id, .. } | Reply::Failed { id, .. } = reply {
                        state.replies.insert(id, (reply, bytes));
                    }
                }
                Err(_) => {
                    // With `hang` nobody notices that a peer, here the one that serves the others, is gone.
                    state.lost = state.joined.is_none() || notices_loss();
                    self.changed.notify_all();
                    return;
                }
            }
            self.changed.notify_all();
        }
    }

    /// Waits for what `done` finds, within the limit; counted as parked if it is a stream that waits.
    fn wait<T>(
        &self,
        what: &str,
        parks: bool,
        mut done: impl FnMut(&mut State) -> Option<Result<T>>,
    ) -> Result<T> {
        let limit = Switches::get().hang_limit;
        let start = Instant::now();
        let mut parked = None;
        let mut state = lock(&self.state);
        loop {
            if let Some(result) = done(&mut state) {
                return result;
            }
            // What faulted took everything on the device with it, operations of NCCL included.
            if parks && let Some(code) = driver::context_error() {
                return Err(Error::cuda(code, what));
            }
            if start.elapsed() >= limit {
                let text = format!("rank {} gave up {what} after {} s", self.rank, limit.as_secs());
                return Err(Error::new(Code::SYSTEM, text));
            }
            if parks && parked.is_none() {
                parked = Some(Parked::new());
            }
            let waited = self.changed.wait_timeout(state, Duration::from_millis(50));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub fn wait_joined(&self) -> Result {
        self.wait("waiting for all ranks to join", false, |state| {
            let lost = || Error::new(Code::REMOTE, "the process that made the unique id has gone");
            state.joined.clone().or_else(|| state.lost.then(|| Err(lost())))
        })
    }

    pub fn has_joined(&self) -> Option<Result> {
        lock(&self.state).joined.clone()
    }

    fn post(&self, request: impl FnOnce(u64) -> Request, bytes: &[u8]) -> Result<u64> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        match wire::send(&*lock(&self.to), &request(id), bytes) {
            Err(why) if notices_loss() => {
                Err(Error::new(Code::REMOTE, format!("the communicator's server: {why}")))
            }
            _ => Ok(id),
        }
    }

    fn reply(&self, id: u64, what: &str, parks: bool) -> Result<(Reply, Vec<u8>)> {
        self.wait(what, parks, |state| {
            if state.aborted {
                return Some(Err(aborted()));
            }
            let reply = state.replies.remove(&id);
            match reply {
                Some((Reply::Failed { error, .. }, _)) => Some(Err(error)),
                Some(reply) => Some(Ok(reply)),
                None => state
                    .lost
                    .then(|| Err(Error::new(Code::REMOTE, "the process that made the unique id has gone"))),
            }
        })
    }

    /// Where this rank goes; `None` if it goes nowhere.
    pub fn split(&self, color: i32, key: i32) -> Result<Option<(Place, usize, usize)>> {
        self.check()?;
        let id = self.post(|id| Request::Split { id, color, key }, &[])?;
        match self.reply(id, "waiting for all ranks to split", false)? {
            (Reply::Split { room: 0, .. }, _) => Ok(None),
            (Reply::Split { room, rank, ranks, .. }, _) => {
                Ok(Some((Place { server: self.server.clone(), room }, rank, ranks)))
            }
            (other, _) => Err(Error::new(Code::INTERNAL, format!("{other:?} for a split"))),
        }
    }

    /// The error that calls give from now on, if any.
    pub fn check(&self) -> Result {
        let state = lock(&self.state);
        if state.aborted {
            return Err(aborted());
        }
        state.error.clone().map_or(Ok(()), Err)
    }

    pub fn is_launching(&self) -> bool {
        lock(&self.state).launching
    }

    pub fn async_error(&self) -> i32 {
        if driver::enter(PROXY) != 0 {
            self.set_error(Error::new(Code::REMOTE, "a connection failed, as SMDDP_STANDIN_FAIL asked"));
        }
        let state = lock(&self.state);
        match (&state.error, &state.joined) {
            (None, _) if state.launching => Code::IN_PROGRESS.0,
            (Some(error), _) | (None, Some(Err(error))) => error.code.0,
            (None, None) => Code::IN_PROGRESS.0,
            (None, Some(Ok(()))) => 0,
        }
    }

    fn set_error(&self, error: Error) {
        let mut state = lock(&self.state);
        if state.aborted {
            return;
        }
        error::set_last(&error.text);
        if state.error.is_none() {
            if !Switches::get().quiet {
                eprintln!(
                    "smddp stand-in for NCCL: rank {}: error {}: {}",
                    self.rank, error.code.0, error.text
                );
            }
            state.error = Some(error);
        }
    }

    /// Queues operations as one: on the first stream, before and after what the others hold.
    pub fn launch(self: &Arc<Self>, operations: Vec<Operation>, streams: &[usize]) -> Result {
        if self.is_blocking {
            self.inside.fetch_add(1, Ordering::SeqCst);
            let launched = self.launch_now(operations, streams);
            self.inside.fetch_sub(1, Ordering::SeqCst);
            return launched;
        }
        lock(&self.state).launching = true;
        let (comm, streams) = (Arc::clone(self), streams.to_vec());
        let launch = move || {
            std::thread::sleep(LAUNCH_TIME);
            let launched = comm.launch_now(operations, &streams);
            if let Err(error) = launched {
                comm.set_error(error);
            }
            lock(&comm.state).launching = false;
            comm.changed.notify_all();
        };
        let thread = std::thread::Builder::new().name("standin-nccl-launch".into());
        thread.spawn(launch).map_err(|why| system("thread", why))?;
        Err(Error::new(Code::IN_PROGRESS, ""))
    }

    fn launch_now(self: &Arc<Self>, operations: Vec<Operation>, streams: &[usize]) -> Result {
        let _order = lock(&self.order);
        self.connect()?;
        let number = lock(&self.state).queued;
        let name = operations.first().map_or("ncclGroup", Operation::name);
        let comm = Arc::clone(self);
        let run = move || {
            comm.run(number, &operations);
            0
        };
        driver::launch(name, streams, run)?;
        let mut state = lock(&self.state);
        state.queued = number + 1;
        state.graphs.extend(streams.iter().filter_map(|stream| driver::graph(*stream)));
        Ok(())
    }

    /// Before the first operation: where the switch says so, waits for the first operations of the other ranks.
    fn connect(&self) -> Result {
        if lock(&self.state).queued > 0 || Switches::get().connect == Connect::Init {
            return Ok(());
        }
        // A split that gives nobody a communicator: all ranks must have come to it.
        self.split(-1, 0).map(|_| ())
    }

    /// On a stream's thread. Whatever happens, the turn passes on.
    fn run(&self, number: u64, operations: &[Operation]) {
        // An operation waits for those called before it, on whatever streams: communicators are serial.
        let turn = self.wait("waiting for an earlier operation", true, |state| {
            let stop = state.aborted || state.error.is_some();
            (stop || state.done == number).then_some(Ok(()))
        });
        let result = turn
            .and_then(|()| self.check())
            .and_then(|()| if driver::enter("nccl") == 0 { Ok(()) } else { Err(injected()) })
            .and_then(|()| self.exchange(operations));
        if let Err(error) = result {
            self.set_error(error);
        }
        lock(&self.state).done += 1;
        self.changed.notify_all();
    }

    /// All requests go out before any reply is waited for: a group cannot block itself.
    fn exchange(&self, operations: &[Operation]) -> Result {
        let mut posted = Vec::with_capacity(operations.len());
        let contributions = operations.iter().map(Operation::contribution).collect::<Result<Vec<_>>>()?;
        operations.iter().try_for_each(Operation::poison)?;
        for (operation, bytes) in operations.iter().zip(contributions) {
            posted.push(self.post(|id| operation.request(id), &bytes)?);
        }
        for (operation, id) in operations.iter().zip(posted) {
            let what = format!("in {}", operation.name());
            let (_, bytes) = self.reply(id, &what, true)?;
            operation.finish(&bytes)?;
        }
        Ok(())
    }

    /// Waits until nothing queued is left, and no graph that could queue it again.
    pub fn drain(&self) -> Result {
        self.wait("waiting for its operations to end, and for graphs that hold some", false, |state| {
            state.graphs.retain(|graph| driver::graph_lives(*graph));
            (state.done >= state.queued && state.graphs.is_empty()).then_some(Ok(()))
        })
    }

    /// Releases whoever waits here. As NCCL's, it waits for the operations queued: one that sits in its stream
    /// behind something that never ends keeps it.
    pub fn abort(&self) -> Result {
        // NCCL frees what the call still uses. Counted, for tests that know better.
        if self.inside.load(Ordering::SeqCst) > 0 {
            driver::enter(ABORTED_INSIDE);
        }
        lock(&self.state).aborted = true;
        self.changed.notify_all();
        self.close();
        self.wait("waiting for a launch to end", false, |state| (!state.launching).then_some(Ok(())))?;
        self.drain()
    }

    /// The server takes this rank as gone.
    pub fn close(&self) {
        // Not through `to`: a writer may hold that while the socket is full. Closed already is closed.
        let _ = self.closer.shutdown(Shutdown::Both);
    }
}

fn aborted() -> Error {
    Error::new(Code::INVALID_USAGE, "the communicator was aborted")
}

fn injected() -> Error {
    Error::new(Code::REMOTE, "an operation failed on its stream, as SMDDP_STANDIN_FAIL asked")
}

/// Joins in a thread of its own or here; in a group not before its end.
pub fn finish_join(comm: Arc<Comm>, handle: usize, blocking: bool) -> Result {
    let wait = move || {
        let joined = comm.wait_joined();
        tell_count(&lock(&COMMS));
        if joined.is_err() {
            comm.close();
            if blocking {
                strike(handle);
            }
        }
        joined
    };
    if blocking {
        return group::later_or_now(Box::new(wait));
    }
    let thread = std::thread::Builder::new().name("standin-nccl-init".into());
    thread.spawn(move || drop(wait())).map_err(|why| system("thread", why))?;
    Err(Error::new(Code::IN_PROGRESS, ""))
}
