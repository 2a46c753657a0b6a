//! What ranks and the server of a communicator say to each other: a JSON header, then bytes.

use crate::error::Error;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    AllReduce,
    ReduceScatter,
    AllGather,
    Broadcast,
    Reduce,
}

/// A collective as one rank called it. All ranks must say the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    pub kind: Kind,
    pub count: u64,
    pub dtype: i32,
    /// 5 for a sum whose inputs were scaled by their ranks.
    pub op: i32,
    pub root: i32,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// Which of the server's communicators: 0 the first, others come from splits.
    pub room: u64,
    pub rank: usize,
    pub ranks: usize,
    pub version: i32,
    pub host: String,
    pub device: i32,
    pub process: u32,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Request {
    Hello(Hello),
    /// With the rank's contribution.
    Collective {
        id: u64,
        call: Call,
    },
    /// With the bytes.
    Send {
        id: u64,
        peer: usize,
        count: u64,
        dtype: i32,
    },
    Recv {
        id: u64,
        peer: usize,
        count: u64,
        dtype: i32,
    },
    Split {
        id: u64,
        color: i32,
        key: i32,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// All ranks are there.
    Ready,
    /// With the result.
    Done {
        id: u64,
    },
    Split {
        id: u64,
        room: u64,
        rank: usize,
        ranks: usize,
    },
    Failed {
        id: u64,
        error: Error,
    },
    Refused(Error),
}

pub fn send(mut to: impl Write, header: &impl Serialize, bytes: &[u8]) -> io::Result<()> {
    let header = serde_json::to_vec(header)?;
    let mut front = Vec::with_capacity(16 + header.len());
    front.extend_from_slice(&(header.len() as u64).to_le_bytes());
    front.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
    front.extend_from_slice(&header);
    to.write_all(&front)?;
    to.write_all(bytes)
}

pub fn receive<T: DeserializeOwned>(mut from: impl Read) -> io::Result<(T, Vec<u8>)> {
    let mut word = [0u8; 8];
    from.read_exact(&mut word)?;
    let mut header = vec![0; u64::from_le_bytes(word) as usize];
    from.read_exact(&mut word)?;
    let mut bytes = vec![0; u64::from_le_bytes(word) as usize];
    from.read_exact(&mut header)?;
    from.read_exact(&mut bytes)?;
    Ok((serde_json::from_slice(&header)?, bytes))
}
