//! The records of what is under way.

use smddp_core::call::PackedCall;
use smddp_core::memory::Region;
use smddp_core::transport::{Ctx, Message, MsgKey};

use crate::domain::Mr;
use crate::slab::Handle;
use crate::wire::{Grant, MAX_RAILS};

/// What a message matches by: the other process and the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Match {
    pub peer: u32,
    pub key: MsgKey,
}

#[derive(Debug)]
pub struct SendOp {
    pub id: Match,
    pub rank: u32,
    pub region: Region,
    pub call: PackedCall,
    pub ctx: Ctx,
    /// Bytes the receiver gave leave for, and bytes out of our hands.
    pub granted: usize,
    pub written: usize,
    /// Pieces posted and not completed.
    pub flying: u32,
    pub announced: bool,
    /// It was there at an earlier look for stuck messages.
    pub old: bool,
    /// Withdrawn: only its flying pieces are waited for.
    pub dead: bool,
}

impl SendOp {
    pub fn new(m: &Message) -> SendOp {
        SendOp {
            id: Match { peer: m.peer, key: m.key },
            rank: m.peer_rank,
            region: m.region,
            call: m.call,
            ctx: m.ctx,
            granted: 0,
            written: 0,
            flying: 0,
            announced: false,
            old: false,
            dead: false,
        }
    }
}

#[derive(Debug)]
pub struct RecvOp {
    pub id: Match,
    pub rank: u32,
    pub region: Region,
    pub call: PackedCall,
    pub ctx: Ctx,
    /// Bytes granted and bytes in place.
    pub granted: usize,
    pub arrived: usize,
    /// The sender announced it; a small one was answered.
    pub announced: bool,
    /// It was there at an earlier look for stuck messages.
    pub old: bool,
    /// It waits for bounce memory.
    pub starved: bool,
}

impl RecvOp {
    pub fn new(m: &Message) -> RecvOp {
        RecvOp {
            id: Match { peer: m.peer, key: m.key },
            rank: m.peer_rank,
            region: m.region,
            call: m.call,
            ctx: m.ctx,
            granted: 0,
            arrived: 0,
            announced: false,
            old: false,
            starved: false,
        }
    }
}

/// A grant received: pieces of a send still to be posted.
#[derive(Debug)]
pub struct OutGrant {
    pub send: Handle,
    pub peer: u32,
    pub group: u64,
    pub grant: Grant,
    pub next: u32,
}

/// One posted piece.
#[derive(Debug)]
pub struct Piece {
    pub send: Handle,
    pub peer: u32,
    pub len: usize,
    /// Slot of the bounce memory it was copied to.
    pub bounce: Option<u32>,
}

/// A grant given: part of a receive on its way.
#[derive(Debug)]
pub struct InGrant {
    pub recv: Handle,
    pub peer: u32,
    pub group: u64,
    pub key: MsgKey,
    pub call: PackedCall,
    pub total: u64,
    pub grant: Grant,
    /// Where the bytes land: the receive's own memory or a bounce slot.
    pub into: Region,
    pub bounce: Option<u32>,
    /// Registrations made for this transfer alone.
    pub mrs: [Option<Mr>; MAX_RAILS],
    /// Tagged receives posted so far.
    pub posted: u32,
    /// Pieces not arrived yet.
    pub left: u32,
    pub bytes: usize,
    /// The peer was told.
    pub sent: bool,
    /// Withdrawn: its memory is only waited for.
    pub dead: bool,
}

/// What a peer has said of a withdrawn group: over which rail, of how many, and how many pieces it ever posted for it.
#[derive(Clone, Copy, Debug)]
pub struct Settled {
    pub peer: u32,
    pub rail: usize,
    pub rails: usize,
    pub posted: u64,
}

/// A small message that came before its receive was posted.
#[derive(Debug)]
pub enum Early {
    Data { bytes: Vec<u8>, call: PackedCall, permitted: bool },
    Announced { total: u64, call: PackedCall },
}

/// A small message to be sent, in order of posting.
#[derive(Clone, Debug)]
pub enum Tx {
    Eager {
        send: Handle,
        permitted: bool,
    },
    Announce {
        send: Handle,
    },
    Permit {
        recv: Handle,
    },
    Grant {
        grant: Handle,
    },
    ProbeSend {
        send: Handle,
        peer: u32,
    },
    ProbeRecv {
        recv: Handle,
        peer: u32,
    },
    /// For receives from any rank, which name no message.
    ProbeAny {
        peer: u32,
        group: u64,
    },
    Credit {
        peer: u32,
    },
    /// To a probe: the next may be sent, and what was sent before has come or is missed (E9).
    Answer {
        peer: u32,
        rail: usize,
    },
    Abort {
        peer: u32,
        group: u64,
        quiet: bool,
        text: std::sync::Arc<str>,
    },
    Settled {
        peer: u32,
        group: u64,
        rail: usize,
        rails: usize,
    },
    Gone {
        peer: u32,
        group: u64,
    },
    Bye {
        peer: u32,
    },
}

impl Tx {
    pub fn is_probe(&self) -> bool {
        matches!(self, Tx::ProbeSend { .. } | Tx::ProbeRecv { .. } | Tx::ProbeAny { .. } | Tx::Answer { .. })
    }
}

/// Marks of posted operations: what kind, and which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Posted {
    Send(u32),
    Recv(u32),
    Piece(Handle),
    Tagged(Handle),
}

impl Posted {
    pub fn ctx(self) -> u64 {
        let (kind, n) = match self {
            Posted::Send(slot) => (1u64, slot),
            Posted::Recv(slot) => (2, slot),
            Posted::Piece(handle) => (3, handle),
            Posted::Tagged(handle) => (4, handle),
        };
        kind << 32 | u64::from(n)
    }

    pub fn from_ctx(ctx: u64) -> Option<Posted> {
        let n = ctx as u32;
        match ctx >> 32 {
            1 => Some(Posted::Send(n)),
            2 => Some(Posted::Recv(n)),
            3 => Some(Posted::Piece(n)),
            4 => Some(Posted::Tagged(n)),
            _ => None,
        }
    }
}
