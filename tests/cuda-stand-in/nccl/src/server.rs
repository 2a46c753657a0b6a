//! The server of a communicator and of all split from it: a thread of the process that asked for the id,
//! and one for each rank connected.

use crate::error::{Error, lock};
use crate::room::{Mail, Room};
use crate::wire::{self, Hello, Reply, Request};
use smddp_standin::switches::{PeerLoss, Switches};
use std::collections::HashMap;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Once};
use std::time::{Duration, Instant};

struct Member {
    process: u32,
    to: Arc<Mutex<UnixStream>>,
}

struct Hall {
    room: Room,
    members: HashMap<usize, Member>,
}

#[derive(Default)]
struct Server {
    halls: Mutex<HashMap<u64, Arc<Mutex<Hall>>>>,
}

/// Ranks of other processes that servers here still serve.
static GUESTS: AtomicUsize = AtomicUsize::new(0);

/// The address of the server of that name.
pub fn address(name: &str) -> io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(name)
}

/// Starts a server; gives its name.
pub fn start() -> io::Result<String> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let mut random = [0u8; 8];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    let serial = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("smddp-standin-{}-{serial}-{:016x}", std::process::id(), u64::from_ne_bytes(random));
    let listener = UnixListener::bind_addr(&address(&name)?)?;
    let server = Arc::new(Server::default());
    std::thread::Builder::new().name("standin-nccl".into()).spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { return };
            let server = Arc::clone(&server);
            let serve = move || server.serve(stream);
            if std::thread::Builder::new().name("standin-nccl-rank".into()).spawn(serve).is_err() {
                return;
            }
        }
    })?;
    linger_at_exit();
    Ok(name)
}

/// A process does not end while ranks elsewhere still use its servers: as with NCCL, where every rank serves
/// itself, they may finish what they began. Bounded: whoever waits for this rank itself waits in vain.
fn linger_at_exit() {
    unsafe extern "C" {
        fn atexit(function: extern "C" fn()) -> i32;
    }
    extern "C" fn linger() {
        let start = Instant::now();
        while GUESTS.load(Ordering::Acquire) > 0 && start.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    static ONCE: Once = Once::new();
    // SAFETY: the function lives as long as this library, which stays loaded until the process ends.
    ONCE.call_once(|| {
        let _ = unsafe { atexit(linger) };
    });
}

impl Server {
    fn hall(&self, room: u64, ranks: usize) -> Arc<Mutex<Hall>> {
        let mut halls = lock(&self.halls);
        let open = || {
            let fail_on_loss = Switches::get().peer_loss == PeerLoss::Error;
            let room = Room::new(ranks, fail_on_loss);
            Arc::new(Mutex::new(Hall { room, members: HashMap::new() }))
        };
        Arc::clone(halls.entry(room).or_insert_with(open))
    }

    fn open(&self, ranks: usize) -> u64 {
        let next = lock(&self.halls).keys().max().map_or(1, |last| last + 1);
        self.hall(next, ranks);
        next
    }

    fn serve(&self, stream: UnixStream) {
        let Ok(from) = stream.try_clone() else { return };
        let Ok((Request::Hello(hello), _)) = wire::receive(&from) else { return };
        let to = Arc::new(Mutex::new(stream));
        let guest = hello.process != std::process::id();
        if guest {
            GUESTS.fetch_add(1, Ordering::AcqRel);
        }
        let hall = self.hall(hello.room, hello.ranks);
        self.serve_rank(&hall, hello, &from, &to);
        if guest {
            GUESTS.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Until the rank leaves.
    fn serve_rank(&self, hall: &Mutex<Hall>, hello: Hello, from: &UnixStream, to: &Arc<Mutex<UnixStream>>) {
        let rank = hello.rank;
        let mut joining = lock(hall);
        match joining.room.join(hello.clone()) {
            Ok(mail) => {
                joining.members.insert(rank, Member { process: hello.process, to: Arc::clone(to) });
                deliver(joining.post(mail));
            }
            Err(error) => return refuse(&mut joining, to, error),
        }
        drop(joining);
        // A rank's end, orderly or not, is the end of its connection.
        while let Ok((request, bytes)) = wire::receive::<Request>(from) {
            let mut hall = lock(hall);
            let mail = self.handle(&mut hall.room, rank, request, bytes);
            let outgoing = hall.post(mail);
            drop(hall);
            deliver(outgoing);
        }
        let mut hall = lock(hall);
        hall.members.remove(&rank);
        let mail = hall.room.leave(rank);
        let outgoing = hall.post(mail);
        drop(hall);
        deliver(outgoing);
    }

    fn handle(&self, room: &mut Room, rank: usize, request: Request, bytes: Vec<u8>) -> Vec<Mail> {
        match request {
            Request::Hello(_) => Vec::new(),
            Request::Collective { id, call } => room.collective(rank, id, call, bytes),
            Request::Send { id, peer, count, dtype } => room.send(rank, id, peer, (count, dtype), bytes),
            Request::Recv { id, peer, count, dtype } => room.receive(rank, id, peer, (count, dtype)),
            Request::Split { id, color, key } => room.split(rank, id, (color, key), |ranks| self.open(ranks)),
        }
    }
}

fn refuse(hall: &mut Hall, to: &Mutex<UnixStream>, error: Error) {
    let mail = hall.room.refuse(&error);
    deliver(hall.post(mail));
    // If it has gone there is nobody to tell.
    let _ = wire::send(&*lock(to), &Reply::Refused(error), &[]);
}

type Outgoing = Vec<(Arc<Mutex<UnixStream>>, Reply, Vec<u8>)>;

impl Hall {
    /// Those of this process come last: it may end once it has its reply, and takes the server along.
    fn post(&self, mail: Vec<Mail>) -> Outgoing {
        let own = std::process::id();
        let mut addressed: Vec<_> = mail
            .into_iter()
            .filter_map(|(rank, reply, bytes)| {
                let member = self.members.get(&rank)?;
                Some((member.process == own, (Arc::clone(&member.to), reply, bytes)))
            })
            .collect();
        addressed.sort_by_key(|(own, _)| *own);
        addressed.into_iter().map(|(_, outgoing)| outgoing).collect()
    }
}

fn deliver(outgoing: Outgoing) {
    for (to, reply, bytes) in outgoing {
        // Its reader notices by itself if a rank has gone.
        let _ = wire::send(&*lock(&to), &reply, &bytes);
    }
}
