//! What travels between a rank and rank 0's store. All numbers are little-endian.
//!
//! ```text
//! hello    magic 8, secret 16, world size u32, rank u32, process u64              client, once a connection
//! request  op u8, 0 u8, key length u16, value length u32, number i64, key, value  client
//! reply    status u8, length u32, bytes                                           server, after each of the above
//! ```
//!
//! The reply to the hello is preceded by the magic, so that a client knows a store from whatever else listens
//! there. `number` is the amount of an add and the milliseconds a get or ready may wait.

use crate::kv::{MAX_KEY, MAX_VALUE};

pub(crate) const MAGIC: [u8; 8] = *b"SMDDPkv1";
pub(crate) const HELLO: usize = 40;
pub(crate) const HEADER: usize = 16;
pub(crate) const REPLY: usize = 5;

/// Shared by the ranks of one job, unknown (by accident, see [`crate::tcp_store`]) to others.
pub(crate) type Secret = [u8; 16];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) secret: Secret,
    pub(crate) size: u32,
    pub(crate) rank: u32,
    /// A random number of the client's: tells a second connection of one rank from a second process.
    pub(crate) process: u64,
}

impl Hello {
    pub(crate) fn encode(&self) -> [u8; HELLO] {
        let mut bytes = [0; HELLO];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..24].copy_from_slice(&self.secret);
        bytes[24..28].copy_from_slice(&self.size.to_le_bytes());
        bytes[28..32].copy_from_slice(&self.rank.to_le_bytes());
        bytes[32..].copy_from_slice(&self.process.to_le_bytes());
        bytes
    }

    /// `Err` as soon as the bytes cannot become a hello, `None` while more are needed.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Option<Hello>, ()> {
        let seen = bytes.len().min(MAGIC.len());
        if bytes[..seen] != MAGIC[..seen] || bytes.len() > HELLO {
            return Err(());
        }
        if bytes.len() < HELLO {
            return Ok(None);
        }
        let mut secret = [0; 16];
        secret.copy_from_slice(&bytes[8..24]);
        Ok(Some(Hello {
            secret,
            size: u32_at(bytes, 24),
            rank: u32_at(bytes, 28),
            process: u64_at(bytes, 32),
        }))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Set = 1,
    Get = 2,
    Add = 3,
    /// Wait until every rank has said hello.
    Ready = 4,
    Goodbye = 5,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Ok = 1,
    /// The wait ended; the bytes are the missing ranks (u32 each) for a ready.
    Timeout = 2,
    /// The request was refused; the bytes say why.
    Refused = 3,
    /// The job cannot come to be, or this process has no place in it; the bytes say why.
    Disagree = 4,
    /// Another job's store.
    Stranger = 5,
    /// A store that is ending: its successor may come.
    Ending = 6,
}

impl Status {
    pub(crate) fn from_byte(byte: u8) -> Option<Status> {
        Some(match byte {
            1 => Status::Ok,
            2 => Status::Timeout,
            3 => Status::Refused,
            4 => Status::Disagree,
            5 => Status::Stranger,
            6 => Status::Ending,
            _ => return None,
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) op: Op,
    pub(crate) number: i64,
    pub(crate) key: String,
    pub(crate) value: Vec<u8>,
}

impl Request {
    /// The caller has checked key and value with [`crate::kv::check`].
    pub(crate) fn encode(op: Op, number: i64, key: &str, value: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER + key.len() + value.len());
        bytes.extend([op as u8, 0]);
        bytes.extend((key.len() as u16).to_le_bytes());
        bytes.extend((value.len() as u32).to_le_bytes());
        bytes.extend(number.to_le_bytes());
        bytes.extend(key.as_bytes());
        bytes.extend(value);
        bytes
    }

    /// The request at the start of `bytes` and its length; `None` while more are needed.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Option<(Request, usize)>, &'static str> {
        if bytes.len() < HEADER {
            return Ok(None);
        }
        let op = match bytes[0] {
            1 => Op::Set,
            2 => Op::Get,
            3 => Op::Add,
            4 => Op::Ready,
            5 => Op::Goodbye,
            _ => return Err("unknown operation"),
        };
        let key_len = usize::from(u16::from_le_bytes([bytes[2], bytes[3]]));
        let value_len = u32_at(bytes, 4) as usize;
        if bytes[1] != 0 || key_len > MAX_KEY || value_len > MAX_VALUE {
            return Err("lengths out of bounds");
        }
        let end = HEADER + key_len + value_len;
        if bytes.len() < end {
            return Ok(None);
        }
        let key = &bytes[HEADER..HEADER + key_len];
        let key = std::str::from_utf8(key).map_err(|_| "a key that is not UTF-8")?.to_owned();
        let value = bytes[HEADER + key_len..end].to_vec();
        Ok(Some((Request { op, number: u64_at(bytes, 8) as i64, key, value }, end)))
    }
}

pub(crate) fn reply_header(status: Status, length: usize) -> [u8; REPLY] {
    let length = (length as u32).to_le_bytes();
    [status as u8, length[0], length[1], length[2], length[3]]
}

/// Status and length of a reply; `None` when no store of ours sent it.
pub(crate) fn parse_reply(bytes: &[u8; REPLY]) -> Option<(Status, usize)> {
    let length = u32_at(bytes, 1) as usize;
    let status = Status::from_byte(bytes[0])?;
    (length <= MAX_VALUE).then_some((status, length))
}

/// The four bytes at `at`, which the caller knows to exist.
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lengths_out_of_bounds_are_refused_by_the_header_alone() {
        let request = |key: u16, value: u32| {
            let mut header = Request::encode(Op::Set, 0, "", b"");
            header[2..4].copy_from_slice(&key.to_le_bytes());
            header[4..8].copy_from_slice(&value.to_le_bytes());
            Request::decode(&header)
        };
        assert_eq!(request(MAX_KEY as u16, MAX_VALUE as u32), Ok(None));
        assert!(request(MAX_KEY as u16 + 1, 0).is_err() && request(1, MAX_VALUE as u32 + 1).is_err());
    }

    proptest! {
        #[test]
        fn a_request_reads_back_from_any_split(key in "[a-z/]{0,20}", value: Vec<u8>, number: i64, cut in 0usize..64) {
            let bytes = Request::encode(Op::Add, number, &key, &value);
            let expected = Request { op: Op::Add, number, key, value };
            prop_assert_eq!(Request::decode(&bytes), Ok(Some((expected, bytes.len()))));
            if cut < bytes.len() {
                prop_assert_eq!(Request::decode(&bytes[..cut]), Ok(None));
            }
        }

        #[test]
        fn any_bytes_are_read_without_panic(mut bytes: Vec<u8>, op in 0u8..7, key in 0u8..20, value in 0u8..100) {
            let _ = (Request::decode(&bytes), Hello::decode(&bytes));
            // Near enough to a request to be looked at further.
            if bytes.len() >= HEADER {
                bytes[..8].copy_from_slice(&[op, 0, key, 0, value, 0, 0, 0]);
                if let Ok(Some((request, end))) = Request::decode(&bytes) {
                    prop_assert!(end <= bytes.len() && request.op as u8 == op);
                    prop_assert_eq!((request.key.len(), request.value.len()), (key.into(), value.into()));
                    let again = Request::encode(request.op, request.number, &request.key, &request.value);
                    prop_assert_eq!(again, &bytes[..end]);
                }
            }
            if let Some(Ok(reply)) = bytes.get(..REPLY).map(<[u8; REPLY]>::try_from) {
                prop_assert!(parse_reply(&reply).is_none_or(|(_, length)| length <= MAX_VALUE));
            }
        }

        #[test]
        fn a_hello_reads_back(secret: [u8; 16], size: u32, rank: u32, process: u64, cut in 0usize..HELLO) {
            let hello = Hello { secret, size, rank, process };
            let bytes = hello.encode();
            prop_assert_eq!(Hello::decode(&bytes), Ok(Some(hello)));
            prop_assert_eq!(Hello::decode(&bytes[..cut]), Ok(None));
            let mut wrong = bytes;
            wrong[cut % 8] ^= 1;
            prop_assert!(Hello::decode(&wrong).is_err());
        }
    }
}
