//! One NIC as the message layer sees it: an endpoint with small messages, remote writes and tagged messages.
//!
//! Rules of every implementation
//! - **D1** nothing blocks; a queue that is full, or a connection being made, is [`Refused::Again`].
//! - **D2** a region posted is the domain's until its completion came out of [`Domain::poll`], or
//!   [`Domain::close`] has returned.
//! - **D3** no order is promised between any two messages or completions.
//! - **D4** one thread at a time.

use std::os::fd::RawFd;
use std::time::Duration;

use smddp_core::memory::{Owner, Region};

use crate::error::Error;

/// A peer's endpoint in this domain.
pub type PeerAddr = u64;

/// What a provider can do and needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caps {
    /// Remote writes with immediate data.
    pub rma: bool,
    /// Every local buffer must lie in registered memory, and registering is dear: others' memory is bounced.
    pub needs_local_mr: bool,
    /// Remote memory is named by virtual address; otherwise by offset in its registration.
    pub virt_addr: bool,
    /// The provider chooses the key of a registration.
    pub prov_key: bool,
    /// Memory of devices can be registered (FI_HMEM).
    pub devices: bool,
    /// Messages go over connections of sockets, which lose what was not read when a packet reaches a closed end (E6).
    pub sockets: bool,
    /// Messages and writes of one peer come in the order posted, up to one that is lost with a broken connection.
    pub ordered: bool,
    /// Largest single transfer in bytes.
    pub max_msg: usize,
}

/// Registered memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mr {
    /// The domain's own number for it.
    pub id: u32,
    /// What a peer must name to write into it.
    pub key: u64,
    /// What a peer adds to an offset: the virtual address of the first byte, or 0.
    pub base: u64,
}

/// Where in a peer's memory a write goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remote {
    pub peer: PeerAddr,
    pub addr: u64,
    pub key: u64,
}

/// Why nothing was posted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Try again after the next poll.
    Again,
    /// This peer cannot be reached, for good.
    Peer(String),
    /// The endpoint is of no use any more.
    Broken(String),
}

pub type Post = Result<(), Refused>;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Completion {
    /// The operation posted with `ctx` is over; `len` bytes were received, if it was a receive.
    Done { ctx: u64, len: usize },
    /// A peer's write with this immediate data is in memory.
    Arrived { data: u32 },
    /// An operation failed. What is known of it: its mark, the immediate data of a broken incoming write, the peer.
    Failed { ctx: Option<u64>, data: Option<u32>, peer: Option<PeerAddr>, canceled: bool, reason: String },
}

/// How to sleep until something may have happened (see [`Domain::arm`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Armed {
    /// Something is there already: poll.
    Ready,
    /// Readable when something happens.
    Fd(RawFd),
    /// No cheap way: sleep a little.
    Blind,
}

pub trait Domain: Send {
    fn caps(&self) -> Caps;
    /// For people: NIC and provider.
    fn describe(&self) -> String;
    /// What a peer passes to [`Domain::insert`].
    fn address(&self) -> &[u8];
    fn insert(&mut self, address: &[u8]) -> Result<PeerAddr, Error>;

    /// Registers memory as local buffer, and as target of peers' writes where `remote`.
    /// Memory of a device only where [`Caps::devices`] says so.
    fn register(&mut self, memory: Region, owner: Owner, remote: bool) -> Result<Mr, Error>;
    /// Ends a registration; nothing more is written through it once this has returned, except by transfers begun.
    fn deregister(&mut self, mr: Mr);

    fn send(&mut self, to: PeerAddr, from: Region, mr: Mr, ctx: u64) -> Post;
    /// Posts a buffer for the next small message of any peer.
    fn recv(&mut self, into: Region, mr: Mr, ctx: u64) -> Post;
    fn write(&mut self, to: Remote, from: Region, mr: Option<Mr>, data: u32, ctx: u64) -> Post;
    fn tagged_send(&mut self, to: PeerAddr, from: Region, mr: Option<Mr>, tag: u64, ctx: u64) -> Post;
    fn tagged_recv(&mut self, into: Region, mr: Option<Mr>, tag: u64, ctx: u64) -> Post;

    /// Makes progress and appends completions; an error means that the endpoint is of no use any more.
    fn poll(&mut self, out: &mut Vec<Completion>) -> Result<(), String>;
    /// Asks for a posted receive back; it completes as `Failed { canceled: true }`, or as if never cancelled.
    fn cancel(&mut self, ctx: u64);

    /// Prepares for sleep; call right before it.
    fn arm(&mut self) -> Armed;
    /// A steady clock, for deadlines and intervals.
    fn now(&self) -> Duration;
    /// Ends the endpoint: afterwards nothing touches any memory posted or registered. `stuck`: something is in flight that peers
    /// may never take, and is not to be waited for (D1).
    fn close(&mut self, stuck: bool);
}
