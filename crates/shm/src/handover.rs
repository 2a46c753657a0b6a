//! How a node's ranks come to share a segment: local rank 0 listens on an abstract Unix socket, checks who comes, and
//! hands out the memfd.
//!
//! ```text
//! rank r                       rank 0
//! Hello (secret, group, r)  →  checks user, secret, group
//!                           ←  Welcome + memfd
//! maps, allocates its share
//! Ready                     →  waits for everybody
//!                           ←  Go, or Failed with the reason; both close the socket
//! ```
//!
//! Every message is one packet. Nothing waits beyond the deadline; a stranger is turned away and changes nothing.

use std::fmt::Write as _;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use bytemuck::{Pod, Zeroable};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use smddp_core::{interrupt, process};

use crate::error::ShmError;
use crate::geometry::{Geometry, Layout, VERSION};
use crate::mask::MAX_LOCAL;
use crate::membership::Membership;
use crate::node::ShmNode;
use crate::peers::{Peers, pid_space};
use crate::segment::Segment;
use crate::sync::Ordering;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Hello {
    version: u32,
    local_rank: u32,
    group: u64,
    secret: [u8; 32],
}

/// The kinds of packets after Hello: one byte, for `FAILED` followed by text, for `NO_MEMORY` by 8 bytes (how much was
/// wanted) and text.
const WELCOME: u8 = b'w';
const READY: u8 = b'r';
const GO: u8 = b'g';
const FAILED: u8 = b'f';
const NO_MEMORY: u8 = b'm';

const PACKET: usize = 1024;
/// A connection that says nothing for so long is dropped.
const PATIENCE: Duration = Duration::from_secs(2);

/// Local rank 0's side, before the others can come: bind, publish [`Listener::name`], [`Listener::serve`].
pub struct Listener {
    socket: OwnedFd,
    name: String,
}

impl Listener {
    /// Listens under a new random name (abstract: it leaves nothing in the file system).
    pub fn bind() -> Result<Listener, ShmError> {
        let random = process::random::<16>().map_err(|e| ShmError::system("getrandom", e))?;
        let mut name = "smddp-".to_owned();
        for byte in random {
            // Writing to a String cannot fail.
            let _ = write!(name, "{byte:02x}");
        }
        let socket = new_socket()?;
        rustix::net::bind(&socket, &address(&name)?).map_err(|e| ShmError::system("bind", e))?;
        rustix::net::listen(&socket, MAX_LOCAL as i32).map_err(|e| ShmError::system("listen", e))?;
        Ok(Listener { socket, name })
    }

    /// What the node's other ranks pass to [`ShmNode::connect`].
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Makes the segment and hands it to the other local ranks; returns when all of them have it.
    ///
    /// # Errors
    /// Memory or limits do not suffice on some rank; a rank does not come before the deadline, or dies.
    pub fn serve(self, who: &Membership, geometry: Geometry) -> Result<ShmNode, ShmError> {
        who.check()?;
        let size = who.ranks.len();
        let fitted = geometry.fitted(size);
        if fitted != geometry {
            tracing::debug!(?geometry, ?fitted, "slots were fitted to what a rank may share");
        }
        let space = pid_space();
        let (segment, file) = match Segment::create(Layout::new(fitted, size), who.group, who.agreed(), space)
        {
            Ok(made) => made,
            Err(error) => {
                turn_away(&self.socket, size - 1, who, &error);
                return Err(error);
            }
        };
        segment.pid(0).store(std::process::id(), Ordering::Relaxed);
        let mut serving = Serving {
            who,
            started: Instant::now(),
            listener: self.socket,
            file,
            segment,
            guests: (0..size).map(|_| None).collect(),
        };
        match serving.gather() {
            Ok(()) => {
                // Everybody is alive and waits: pids are what they seem.
                let peers = Peers::watch(&serving.segment, 0, space);
                serving.tell_all(&[GO]);
                Ok(ShmNode::new(serving.segment, who, peers, who.agreed()))
            }
            Err(error) => {
                serving.tell_all(&failure(&error));
                let absent = serving.guests[1..].iter().filter(|guest| guest.is_none()).count();
                turn_away(&serving.listener, absent, who, &error);
                Err(error)
            }
        }
    }
}

/// Tells the `absent` ranks, as they come in the next moment, why there is nothing to come for.
fn turn_away(listener: &OwnedFd, absent: usize, who: &Membership, error: &ShmError) {
    let until = who.deadline.min(Instant::now() + PATIENCE);
    let mut hello = Hello::zeroed();
    for _ in 0..absent {
        if !matches!(poll_until(&mut [PollFd::new(listener, PollFlags::IN)], until), Ok(true)) {
            return;
        }
        if let Ok(guest) = rustix::net::accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            // Whoever it is, it gets no more than these words.
            let _ = receive(&guest, bytemuck::bytes_of_mut(&mut hello), until);
            let _ = send(&guest, &failure(error), None);
        }
    }
}

/// A local rank that said who it is.
struct Guest {
    socket: OwnedFd,
    ready: bool,
}

struct Serving<'a> {
    who: &'a Membership,
    started: Instant,
    listener: OwnedFd,
    file: OwnedFd,
    segment: Segment,
    /// By local rank; the first stays empty.
    guests: Vec<Option<Guest>>,
}

impl Serving<'_> {
    /// Until every other local rank has mapped the segment.
    fn gather(&mut self) -> Result<(), ShmError> {
        while self.absent().next().is_some() {
            let (newcomer, heard) = self.wait()?;
            for rank in heard {
                self.hear(rank)?;
            }
            if newcomer {
                self.accept()?;
            }
        }
        Ok(())
    }

    fn absent(&self) -> impl Iterator<Item = usize> {
        let ready = |rank: usize| self.guests[rank].as_ref().is_some_and(|guest| guest.ready);
        (1..self.guests.len()).filter(move |&rank| !ready(rank))
    }

    /// Whether somebody knocks, and the guests that sent something or left.
    fn wait(&self) -> Result<(bool, Vec<usize>), ShmError> {
        let guests: Vec<(usize, &Guest)> =
            self.guests.iter().enumerate().filter_map(|(r, g)| Some((r, g.as_ref()?))).collect();
        let mut fds = vec![PollFd::new(&self.listener, PollFlags::IN)];
        fds.extend(guests.iter().map(|(_, guest)| PollFd::new(&guest.socket, PollFlags::IN)));
        if !poll_until(&mut fds, self.who.deadline)? {
            return Err(self.who.missing(self.started, self.absent()));
        }
        let heard = guests.iter().zip(&fds[1..]).filter(|(_, fd)| !fd.revents().is_empty());
        Ok((!fds[0].revents().is_empty(), heard.map(|((rank, _), _)| *rank).collect()))
    }

    fn accept(&mut self) -> Result<(), ShmError> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = match rustix::net::accept_with(&self.listener, flags) {
            Ok(socket) => socket,
            // It gave up before we came to it, or a signal came.
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => return Ok(()),
            Err(error) => return Err(ShmError::system("accept", error)),
        };
        match self.admit(socket) {
            Ok(()) => {}
            Err(reason) => tracing::warn!(reason, "turned away a connection to this node's shared memory"),
        }
        Ok(())
    }

    /// Checks a newcomer and gives it the segment. An error concerns the newcomer alone.
    fn admit(&mut self, socket: OwnedFd) -> Result<(), String> {
        let peer = of_this_user(&socket).map_err(|e| e.to_string())?;
        let patience = self.who.deadline.min(Instant::now() + PATIENCE);
        let refuse = |reason: String| {
            // It may have left already; the reason is logged here anyway.
            let _ = send(&socket, &failed(FAILED, &reason), None);
            Err(reason)
        };
        let mut hello = Hello::zeroed();
        match receive(&socket, bytemuck::bytes_of_mut(&mut hello), patience) {
            Ok(Some((len, _))) if len == size_of::<Hello>() => {}
            _ => return refuse("it did not say who it is".to_owned()),
        }
        if hello.version != VERSION {
            return refuse(format!("it speaks version {}, local rank 0 version {VERSION}", hello.version));
        }
        if !same(&hello.secret, &self.who.secret) {
            return refuse("it does not know the job's secret".to_owned());
        }
        let rank = hello.local_rank as usize;
        if hello.group != self.who.group || rank == 0 || rank >= self.guests.len() {
            return refuse(format!("it wants to be local rank {rank} of group {:x}", hello.group));
        }
        if self.guests[rank].is_some() {
            return refuse(format!("local rank {rank} is here already"));
        }
        send(&socket, &[WELCOME], Some(self.file.as_fd())).map_err(|e| e.to_string())?;
        self.segment.pid(rank).store(peer.pid.max(0) as u32, Ordering::Relaxed);
        self.guests[rank] = Some(Guest { socket, ready: false });
        Ok(())
    }

    /// What a guest has to say: that it is ready, that it failed, or nothing any more.
    fn hear(&mut self, rank: usize) -> Result<(), ShmError> {
        let Some(guest) = &mut self.guests[rank] else { return Ok(()) };
        let mut packet = [0u8; PACKET];
        match receive(&guest.socket, &mut packet, self.who.deadline) {
            Ok(Some((1, _))) if packet[0] == READY => guest.ready = true,
            Ok(None) => {}
            Ok(Some((len, _))) if len > 0 => return Err(self.reported(rank, &packet[..len])),
            Ok(_) => return Err(self.who.gone(rank, "it left while memory was handed over")),
            Err(error) => return Err(self.who.gone(rank, error)),
        }
        Ok(())
    }

    fn reported(&self, rank: usize, packet: &[u8]) -> ShmError {
        match failure_in(packet) {
            ShmError::Memory { wanted, reason } => {
                ShmError::Memory { wanted, reason: format!("on rank {}: {reason}", self.who.ranks[rank]) }
            }
            other => self.who.gone(rank, other),
        }
    }

    fn tell_all(&self, packet: &[u8]) {
        for guest in self.guests.iter().flatten() {
            // One that has left in the meantime is found by its process's end.
            let _ = send(&guest.socket, packet, None);
        }
    }
}

impl ShmNode {
    /// Joins the segment that local rank 0 serves under `name`; returns when all local ranks have it.
    ///
    /// # Errors
    /// As [`Listener::serve`]; also when local rank 0 refuses this rank, and says why.
    pub fn connect(name: &str, who: &Membership) -> Result<ShmNode, ShmError> {
        who.check()?;
        let started = Instant::now();
        let socket = dial(name, who, started)?;
        let hello = Hello {
            version: VERSION,
            local_rank: who.local_rank as u32,
            group: who.group,
            secret: who.secret,
        };
        say(&socket, bytemuck::bytes_of(&hello), who)?;
        let Answer { kind: WELCOME, file: Some(file) } = answer(&socket, who, started)? else {
            return Err(ShmError::Refused("local rank 0 answered out of turn".to_owned()));
        };
        let (segment, header) = match Segment::open(&file, who.group, who.ranks.len(), who.local_rank) {
            Ok(opened) => opened,
            Err(error) => {
                // Local rank 0 tells the others; if it is gone they find out by themselves.
                let _ = send(&socket, &failure(&error), None);
                return Err(error);
            }
        };
        drop(file);
        let space = header.pid_space;
        say(&socket, &[READY], who)?;
        let Answer { kind: GO, .. } = answer(&socket, who, started)? else {
            return Err(ShmError::Refused("local rank 0 answered out of turn".to_owned()));
        };
        let peers = Peers::watch(&segment, who.local_rank, space);
        Ok(ShmNode::new(segment, who, peers, header.agreed()))
    }
}

/// A connection to the process that listens under `name`, checked to be this user's.
fn dial(name: &str, who: &Membership, started: Instant) -> Result<OwnedFd, ShmError> {
    let socket = new_socket()?;
    let address = address(name)?;
    loop {
        match rustix::net::connect(&socket, &address) {
            Ok(()) => break,
            // The queue of those who knock is full.
            Err(Errno::AGAIN | Errno::INTR) if Instant::now() < who.deadline => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(Errno::AGAIN | Errno::INTR) => return Err(who.missing(started, std::iter::once(0))),
            Err(Errno::CONNREFUSED) => {
                return Err(ShmError::Refused(format!(
                    "nobody listens on '{name}': rank {} has given up, or runs in another network namespace",
                    who.ranks[0]
                )));
            }
            Err(error) => return Err(ShmError::system("connect", error)),
        }
    }
    of_this_user(&socket)?;
    Ok(socket)
}

/// Sends to local rank 0. When that has given up already, its answer says why: that is not an error yet.
fn say(socket: &OwnedFd, packet: &[u8], who: &Membership) -> Result<(), ShmError> {
    match send(socket, packet, None) {
        Ok(()) | Err(Errno::PIPE | Errno::CONNRESET) => Ok(()),
        Err(error) => Err(who.gone(0, error)),
    }
}

struct Answer {
    kind: u8,
    file: Option<OwnedFd>,
}

/// Local rank 0's next packet; its failures become errors.
fn answer(socket: &OwnedFd, who: &Membership, started: Instant) -> Result<Answer, ShmError> {
    let mut packet = [0u8; PACKET];
    match receive(socket, &mut packet, who.deadline) {
        Ok(Some((0, _))) => Err(who.gone(0, "it left while memory was handed over")),
        Ok(Some((1, file))) => Ok(Answer { kind: packet[0], file }),
        Ok(Some((len, _))) => Err(failure_in(&packet[..len])),
        Ok(None) => Err(who.missing(started, std::iter::once(0))),
        Err(error) => Err(who.gone(0, error)),
    }
}

fn failed(kind: u8, text: &str) -> Vec<u8> {
    let mut packet = vec![kind];
    packet.extend_from_slice(&text.as_bytes()[..text.len().min(PACKET - 16)]);
    packet
}

/// The packet that tells others of `error`.
fn failure(error: &ShmError) -> Vec<u8> {
    match error {
        ShmError::Memory { wanted, reason } => {
            let mut packet = failed(NO_MEMORY, reason);
            packet.splice(1..1, (*wanted as u64).to_le_bytes());
            packet
        }
        ShmError::Late { .. }
        | ShmError::Gone { .. }
        | ShmError::Refused(_)
        | ShmError::System { .. }
        | ShmError::Parameters(_) => failed(FAILED, &error.to_string()),
    }
}

fn failure_in(packet: &[u8]) -> ShmError {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    match packet {
        [NO_MEMORY, a, b, c, d, e, f, g, h, reason @ ..] => ShmError::Memory {
            wanted: u64::from_le_bytes([*a, *b, *c, *d, *e, *f, *g, *h]) as usize,
            reason: text(reason),
        },
        [FAILED, reason @ ..] => ShmError::Refused(text(reason)),
        _ => ShmError::Refused("a packet that makes no sense".to_owned()),
    }
}

/// Equality that takes as long whatever differs.
fn same(a: &[u8; 32], b: &[u8; 32]) -> bool {
    a.iter().zip(b).fold(0, |sum, (x, y)| sum | (x ^ y)) == 0
}

fn new_socket() -> Result<OwnedFd, ShmError> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        .map_err(|e| ShmError::system("socket", e))
}

fn address(name: &str) -> Result<SocketAddrUnix, ShmError> {
    SocketAddrUnix::new_abstract_name(name.as_bytes())
        .map_err(|e| ShmError::Refused(format!("'{name}' is no socket name: {e}")))
}

/// Who is at the other end, which must be this user's process.
fn of_this_user(socket: &OwnedFd) -> Result<libc::ucred, ShmError> {
    let peer = credentials(socket)?;
    check_user(peer.uid, rustix::process::geteuid().as_raw())?;
    Ok(peer)
}

fn check_user(theirs: u32, own: u32) -> Result<(), ShmError> {
    if theirs == own {
        return Ok(());
    }
    Err(ShmError::Refused(format!("the other process belongs to user {theirs}, not to {own}")))
}

fn credentials(socket: &OwnedFd) -> Result<libc::ucred, ShmError> {
    // rustix has this too, but its type cannot hold the pid 0 of a process in another pid namespace.
    let mut found = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: both pointers are valid for the sizes given, and the descriptor is open.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut found).cast(),
            &raw mut len,
        )
    };
    if result == 0 && len as usize == size_of::<libc::ucred>() {
        return Ok(found);
    }
    Err(ShmError::system("asking who a peer is", std::io::Error::last_os_error()))
}

/// Waits until one of `fds` has something or `deadline` has passed, or the wait is interrupted (false).
fn poll_until(fds: &mut [PollFd<'_>], deadline: Instant) -> Result<bool, ShmError> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let slice = interrupt::slice(left);
        let limit = Timespec { tv_sec: slice.as_secs() as i64, tv_nsec: i64::from(slice.subsec_nanos()) };
        match rustix::event::poll(fds, Some(&limit)) {
            Ok(0) if slice < left && !interrupt::came() => {}
            Ok(n) => return Ok(n > 0),
            Err(Errno::INTR) => {}
            Err(error) => return Err(ShmError::system("poll", error)),
        }
    }
}

fn send(socket: &OwnedFd, packet: &[u8], file: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let files = file.as_slice();
    if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
        return Err(Errno::NOBUFS);
    }
    // A few packets never fill a socket's buffer, so this does not wait.
    rustix::net::sendmsg(socket, &[IoSlice::new(packet)], &mut control, SendFlags::NOSIGNAL).map(drop)
}

/// The length of the next packet and the file that came with it; `None` when the deadline passed. Length 0: the peer left.
fn receive(
    socket: &OwnedFd,
    packet: &mut [u8],
    deadline: Instant,
) -> Result<Option<(usize, Option<OwnedFd>)>, ShmError> {
    if !poll_until(&mut [PollFd::new(socket, PollFlags::IN)], deadline)? {
        return Ok(None);
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut receive = || {
        let flags = RecvFlags::CMSG_CLOEXEC;
        rustix::net::recvmsg(socket, &mut [IoSliceMut::new(packet)], &mut control, flags)
    };
    // A peer that left without reading everything is reported once; what it said before comes after that.
    let received = match receive() {
        Err(Errno::CONNRESET) => receive(),
        other => other,
    };
    let received = received.map_err(|e| ShmError::system("receiving from a local rank", e))?;
    let mut file = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(files) = message {
            file = files.last();
        }
    }
    Ok(Some((received.bytes, file)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use smddp_core::order::Order;

    use super::*;
    use crate::geometry::SingleCopies;

    proptest! {
        #[test]
        fn a_failure_reads_back_and_any_packet_is_one(reason in ".{0,300}", wanted: u32, noise: Vec<u8>) {
            let memory = ShmError::Memory { wanted: wanted as usize, reason: reason.clone() };
            let other = ShmError::Refused(reason);
            for error in [memory, other] {
                let packet = failure(&error);
                prop_assert!(packet.len() <= PACKET);
                let (said, read) = (error.to_string(), failure_in(&packet).to_string());
                prop_assert!(read.contains(&said) || said.len() > 200, "{read}: {said}");
            }
            let _ = failure_in(&noise).to_string();
        }
    }

    fn who(local_rank: usize) -> Membership {
        Membership {
            group: 7,
            secret: [3; 32],
            local_rank,
            ranks: vec![10, 11],
            node: "here".to_owned(),
            single_copy: SingleCopies::NONE,
            hands_back: false,
            far: Order::FourPages,
            streams_from: None,
            deadline: Instant::now() + Duration::from_secs(60),
        }
    }

    /// What local rank 1 says first.
    const HELLO: Hello = Hello { version: VERSION, local_rank: 1, group: 7, secret: [3; 32] };

    #[test]
    fn no_user_is_another() {
        check_user(7, 7).unwrap();
        for (theirs, own) in [(7, 0), (0, 7), (u32::MAX, 7)] {
            let said = check_user(theirs, own).unwrap_err().to_string();
            assert!(said.contains(&format!("user {theirs}, not to {own}")), "{said}");
        }
    }

    /// Runs `act` on a thread of another user, which root alone can; whether it did.
    fn as_nobody(act: impl FnOnce() + Send) -> bool {
        const NOBODY: libc::c_long = 65534;
        if !rustix::process::geteuid().is_root() {
            eprintln!("NOT RUN: only root can be another user");
            return false;
        }
        let nobody = || {
            // SAFETY: no memory is involved. The call itself changes its thread alone, unlike libc's function.
            assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) }, 0);
            act();
        };
        std::thread::scope(|scope| scope.spawn(nobody).join().unwrap());
        true
    }

    #[test]
    fn another_user_gets_no_segment_though_it_knows_the_secret() {
        let listener = Listener::bind().unwrap();
        let name = listener.name().to_owned();
        std::thread::scope(|scope| {
            let serving = scope.spawn(|| listener.serve(&who(0), Geometry { slot: 4096, slots: 2 }));
            as_nobody(|| {
                let socket = new_socket().unwrap();
                rustix::net::connect(&socket, &address(&name).unwrap()).unwrap();
                // It may be turned away before it has said a word.
                let _ = send(&socket, bytemuck::bytes_of(&HELLO), None);
                let mut answer = [0; PACKET];
                let answer = receive(&socket, &mut answer, who(1).deadline).unwrap();
                assert!(matches!(answer, Some((0, None))), "{answer:?}");
            });
            ShmNode::connect(&name, &who(1)).unwrap();
            serving.join().unwrap().unwrap();
        });
    }

    #[test]
    fn no_rank_takes_a_segment_of_another_user() {
        let mut theirs = None;
        if as_nobody(|| theirs = Some(Listener::bind().unwrap())) {
            let refused = dial(theirs.unwrap().name(), &who(1), Instant::now()).unwrap_err();
            assert!(matches!(&refused, ShmError::Refused(why) if why.contains("65534")), "{refused}");
        }
    }

    /// Packets that no rank of ours would send, from processes of this user, which nothing keeps from the socket.
    #[test]
    fn whoever_says_anything_else_changes_nothing() {
        let listener = Listener::bind().unwrap();
        let name = listener.name().to_owned();
        let hello = |change: fn(&mut Hello)| {
            let mut hello = HELLO;
            change(&mut hello);
            bytemuck::bytes_of(&hello).to_vec()
        };
        let mut packets = vec![
            vec![READY],
            vec![0; PACKET],
            hello(|_| ())[..20].to_vec(),
            // Longer than ours, as that of a later version may be.
            [hello(|hello| hello.version += 1), vec![0]].concat(),
            hello(|hello| hello.version += 1),
            hello(|hello| hello.local_rank = 0),
            hello(|hello| hello.local_rank = 2),
            hello(|hello| hello.local_rank = u32::MAX),
            hello(|hello| hello.group = 8),
            hello(|hello| hello.secret[31] = 4),
        ];
        packets.extend(
            (0..64u8).map(|n| (0..64).map(|at: u8| at.wrapping_mul(n) ^ n).take(1 + n as usize).collect()),
        );
        std::thread::scope(|scope| {
            let serving = scope.spawn(|| listener.serve(&who(0), Geometry { slot: 4096, slots: 2 }));
            for packet in &packets {
                let stranger = dial(&name, &who(1), Instant::now()).unwrap();
                send(&stranger, packet, None).unwrap();
                let mut answer = [0; PACKET];
                let (len, file) = receive(&stranger, &mut answer, who(1).deadline).unwrap().unwrap();
                assert!(file.is_none() && answer[..len].first() != Some(&WELCOME), "{packet:?} was let in");
            }
            ShmNode::connect(&name, &who(1)).unwrap();
            serving.join().unwrap().unwrap();
        });
    }
}
