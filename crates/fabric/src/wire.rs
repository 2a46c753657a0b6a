//! What travels: the header of every small message, and the address a process publishes.
//!
//! Bytes come from outside. [`decode`] and [`Address::decode`] accept nothing whose use could reach outside a buffer:
//! - **W1** every length, offset and count is checked against what carries it, without overflow;
//! - **W2** a grant's pieces cover its span exactly and number at most [`MAX_PIECES`].

use smddp_core::call::PackedCall;
use smddp_core::transport::MsgKey;

const MAGIC: u32 = u32::from_le_bytes(*b"SMF1");
/// Bytes before the payload of every small message.
pub const HEADER: usize = 104;
/// Rails of one process, at most.
pub const MAX_RAILS: usize = 8;
/// Pieces of one grant, at most: tags have 24 bits for them.
pub const MAX_PIECES: u64 = 1 << 24;

/// Where one rail's writes of a grant go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Target {
    pub addr: u64,
    pub key: u64,
}

/// A receiver's leave to send bytes `off..off + span` of a message in pieces of `piece` bytes, piece p over rail
/// p mod `rails`, into `targets` (or, where `tagged`, as tagged messages).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The receiver's number for this transfer; comes back with every piece.
    pub id: u32,
    pub off: u64,
    pub span: u64,
    pub piece: u64,
    pub rails: u8,
    pub tagged: bool,
    pub targets: [Target; MAX_RAILS],
}

impl Grant {
    pub fn pieces(&self) -> u32 {
        self.span.div_ceil(self.piece.max(1)) as u32
    }

    /// Offset in the message and length of piece `p`.
    pub fn range(&self, p: u32) -> (usize, usize) {
        let start = u64::from(p) * self.piece;
        ((self.off + start) as usize, self.piece.min(self.span - start) as usize)
    }

    pub fn rail(&self, p: u32) -> usize {
        p as usize % self.rails as usize
    }

    /// The tag of piece `p`, unique among the receiver's live transfers.
    pub fn tag(&self, p: u32) -> u64 {
        u64::from(self.id) << 24 | u64::from(p)
    }
}

/// How long the pieces of a grant of `span` bytes are, over so many rails, none of which takes more than `limit` at once.
pub fn piece_of(span: u64, rails: u8, limit: u64) -> u64 {
    // As many over each rail.
    let pieces = span.div_ceil(u64::from(rails)).div_ceil(limit).max(1).saturating_mul(u64::from(rails));
    span.div_ceil(pieces).next_multiple_of(64).min(limit).max(span.div_ceil(MAX_PIECES))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body<'a> {
    /// A whole message; `permitted` when it answers [`Body::Permit`] and costs no credit.
    Eager {
        data: &'a [u8],
        permitted: bool,
    },
    /// A message that waits for leave: small without credit, or large where the receiver bounces.
    Announce,
    /// The receive of an announced small message is posted: send it.
    Permit,
    Grant(Grant),
    /// A long wait: what the sender of this packet waits for (`receiving`, or to be allowed to send).
    Probe {
        receiving: bool,
    },
    /// Only the header's credits and number; an `answer` to a probe, that the number is known.
    Credit {
        answer: bool,
    },
    /// The group failed (`quiet`: was only withdrawn) at the sender; it wants [`Body::Settled`].
    Abort {
        quiet: bool,
        text: &'a str,
    },
    /// The group was destroyed at the sender, who is asked or waited for in it. What it sent before may come later.
    Gone,
    /// No more pieces of this group will come; the header's `total` is how many ever were posted. Where they keep their order, it
    /// comes over so many rails, on each behind all that was ever written over it.
    Settled {
        rails: u8,
    },
    /// The last packet of an endpoint that goes, or the answer to one (E6): nothing follows.
    Bye,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet<'a> {
    /// The sender's [`Address::uid`].
    pub from: u64,
    /// Credits the sender of this packet ever gave to its receiver, modulo 2³².
    pub given: u32,
    /// Small messages and remote writes that the sender posted on this rail to its receiver before this one, modulo 2³².
    pub number: u32,
    pub key: MsgKey,
    pub call: PackedCall,
    /// Bytes of the whole message that `key` names.
    pub total: u64,
    pub body: Body<'a>,
}

const EAGER: u8 = 1;
const ANNOUNCE: u8 = 2;
const PERMIT: u8 = 3;
const GRANT: u8 = 4;
const PROBE: u8 = 5;
const CREDIT: u8 = 6;
const ABORT: u8 = 7;
const SETTLED: u8 = 8;
const BYE: u8 = 9;
const GONE: u8 = 10;

fn put<const N: usize>(out: &mut [u8], at: usize, bytes: [u8; N]) {
    out[at..at + N].copy_from_slice(&bytes);
}

/// Writes the packet at the start of `out` and gives its length. `out` has [`HEADER`] bytes and room for the
/// payload: the caller sized its slots so, and cut abort texts to fit.
pub fn encode(packet: &Packet<'_>, out: &mut [u8]) -> usize {
    let (kind, flag, rails, grant) = match &packet.body {
        Body::Eager { permitted, .. } => (EAGER, *permitted, 0, None),
        Body::Announce => (ANNOUNCE, false, 0, None),
        Body::Permit => (PERMIT, false, 0, None),
        Body::Grant(g) => (GRANT, g.tagged, g.rails, Some(g)),
        Body::Probe { receiving } => (PROBE, *receiving, 0, None),
        Body::Credit { answer } => (CREDIT, *answer, 0, None),
        Body::Abort { quiet, .. } => (ABORT, *quiet, 0, None),
        Body::Settled { rails } => (SETTLED, false, *rails, None),
        Body::Bye => (BYE, false, 0, None),
        Body::Gone => (GONE, false, 0, None),
    };
    put(out, 0, MAGIC.to_le_bytes());
    put(out, 4, [kind, u8::from(flag), rails, 0]);
    put(out, 8, packet.from.to_le_bytes());
    put(out, 16, packet.given.to_le_bytes());
    put(out, 20, grant.map_or(0, |g| g.id).to_le_bytes());
    out[24..48].copy_from_slice(bytemuck::bytes_of(&packet.key));
    out[48..64].copy_from_slice(bytemuck::bytes_of(&packet.call));
    put(out, 64, packet.total.to_le_bytes());
    put(out, 72, grant.map_or(0, |g| g.off).to_le_bytes());
    put(out, 80, grant.map_or(0, |g| g.span).to_le_bytes());
    put(out, 88, grant.map_or(0, |g| g.piece).to_le_bytes());
    let payload = payload(&packet.body, &mut out[HEADER..]);
    put(out, 96, (payload as u32).to_le_bytes());
    put(out, 100, packet.number.to_le_bytes());
    HEADER + payload
}

fn payload(body: &Body<'_>, out: &mut [u8]) -> usize {
    match body {
        Body::Eager { data, .. } => {
            out[..data.len()].copy_from_slice(data);
            data.len()
        }
        Body::Grant(grant) => {
            for (i, target) in grant.targets[..grant.rails as usize].iter().enumerate() {
                put(out, i * 16, target.addr.to_le_bytes());
                put(out, i * 16 + 8, target.key.to_le_bytes());
            }
            grant.rails as usize * 16
        }
        Body::Abort { text, .. } => {
            out[..text.len()].copy_from_slice(text.as_bytes());
            text.len()
        }
        Body::Announce
        | Body::Permit
        | Body::Probe { .. }
        | Body::Credit { .. }
        | Body::Settled { .. }
        | Body::Bye
        | Body::Gone => 0,
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// Reads one received message of exactly `bytes`; `None` when it is not one of ours or breaks W1 or W2.
pub fn decode(bytes: &[u8]) -> Option<Packet<'_>> {
    if bytes.len() < HEADER || u32_at(bytes, 0)? != MAGIC {
        return None;
    }
    let data = &bytes[HEADER..];
    if u32_at(bytes, 96)? as usize != data.len() {
        return None;
    }
    let flag = match bytes[5] {
        0 => false,
        1 => true,
        _ => return None,
    };
    let total = u64_at(bytes, 64)?;
    let body = match bytes[4] {
        EAGER if total == data.len() as u64 => Body::Eager { data, permitted: flag },
        ANNOUNCE => Body::Announce,
        PERMIT => Body::Permit,
        GRANT => Body::Grant(grant(bytes, data, total, flag)?),
        PROBE => Body::Probe { receiving: flag },
        CREDIT => Body::Credit { answer: flag },
        ABORT => Body::Abort { quiet: flag, text: std::str::from_utf8(data).ok()? },
        SETTLED => Body::Settled { rails: bytes[6] },
        BYE => Body::Bye,
        GONE => Body::Gone,
        _ => return None,
    };
    Some(Packet {
        from: u64_at(bytes, 8)?,
        given: u32_at(bytes, 16)?,
        number: u32_at(bytes, 100)?,
        key: bytemuck::pod_read_unaligned(&bytes[24..48]),
        call: bytemuck::pod_read_unaligned(&bytes[48..64]),
        total,
        body,
    })
}

fn grant(bytes: &[u8], data: &[u8], total: u64, tagged: bool) -> Option<Grant> {
    let rails = bytes[6];
    let (off, span, piece) = (u64_at(bytes, 72)?, u64_at(bytes, 80)?, u64_at(bytes, 88)?);
    let fits = span > 0 && piece > 0 && off.checked_add(span)? <= total && total <= isize::MAX as u64;
    let rails_fit = (1..=MAX_RAILS).contains(&usize::from(rails)) && data.len() == usize::from(rails) * 16;
    if !fits || !rails_fit || span.div_ceil(piece) > MAX_PIECES {
        return None;
    }
    let mut targets = [Target::default(); MAX_RAILS];
    for (i, target) in targets[..rails as usize].iter_mut().enumerate() {
        *target = Target { addr: u64_at(data, i * 16)?, key: u64_at(data, i * 16 + 8)? };
    }
    Some(Grant { id: u32_at(bytes, 20)?, off, span, piece, rails, tagged, targets })
}

/// What a process publishes so that others reach it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// Random identity of the endpoint.
    pub uid: u64,
    /// Largest message that may come unasked, in bytes.
    pub eager: u32,
    /// Largest piece that may be asked of this process, in bytes.
    pub max_piece: u64,
    /// Whether large messages come as remote writes; else tagged.
    pub rma: bool,
    /// Whether memory outside staging is bounced, so that a large send is announced.
    pub bounces: bool,
    pub provider: String,
    /// Endpoint names, one a rail.
    pub rails: Vec<Vec<u8>>,
}

const ADDRESS_MAGIC: &[u8; 8] = b"SMDDPFB1";

impl Address {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = ADDRESS_MAGIC.to_vec();
        out.extend(self.uid.to_le_bytes());
        out.extend(self.eager.to_le_bytes());
        out.extend(self.max_piece.to_le_bytes());
        out.extend([u8::from(self.rma), u8::from(self.bounces)]);
        for text in std::iter::once(self.provider.as_bytes()).chain(self.rails.iter().map(Vec::as_slice)) {
            out.extend((text.len() as u16).to_le_bytes());
            out.extend(text);
        }
        out
    }

    /// `None` when the bytes are not an address of this version.
    pub fn decode(bytes: &[u8]) -> Option<Address> {
        if bytes.get(..8)? != ADDRESS_MAGIC {
            return None;
        }
        let flag = |at: usize| match bytes.get(at) {
            Some(0) => Some(false),
            Some(1) => Some(true),
            _ => None,
        };
        let mut texts = Vec::new();
        let mut at = 30;
        while at < bytes.len() {
            let len = usize::from(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
            texts.push(bytes.get(at + 2..at + 2 + len)?.to_vec());
            at += 2 + len;
        }
        if texts.len() < 2 || texts.len() > MAX_RAILS + 1 {
            return None;
        }
        let provider = String::from_utf8(texts.remove(0)).ok()?;
        let (eager, max_piece) = (u32_at(bytes, 16)?, u64_at(bytes, 20)?);
        if max_piece == 0 {
            return None;
        }
        Some(Address {
            uid: u64_at(bytes, 8)?,
            eager,
            max_piece,
            rma: flag(28)?,
            bounces: flag(29)?,
            provider,
            rails: texts,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key() -> impl Strategy<Value = MsgKey> {
        (any::<u64>(), any::<u64>(), any::<u64>()).prop_map(|(group, seq, tag)| MsgKey { group, seq, tag })
    }

    fn call() -> impl Strategy<Value = PackedCall> {
        (any::<[u8; 4]>(), any::<u32>(), any::<u64>()).prop_map(|(b, root, count)| PackedCall {
            collective: b[0],
            dtype: b[1],
            op: b[2],
            form: b[3],
            root,
            count,
        })
    }

    fn grants() -> impl Strategy<Value = (Grant, u64)> {
        (any::<u32>(), 0..1u64 << 40, 1..1u64 << 30, 64..1u64 << 20, 1..=8u8, any::<bool>(), 0..1000u64)
            .prop_map(|(id, off, span, piece, rails, tagged, more)| {
                let mut targets = [Target::default(); MAX_RAILS];
                for (i, t) in targets[..rails as usize].iter_mut().enumerate() {
                    *t = Target { addr: span ^ i as u64, key: u64::MAX - i as u64 };
                }
                (Grant { id, off, span, piece, rails, tagged, targets }, off + span + more)
            })
    }

    #[test]
    fn a_grant_of_more_than_four_gigabytes_covers_it() {
        for span in [(1u64 << 32) - 1, 1 << 32, (1 << 32) + 1, 5 << 30, (1 << 40) + 7] {
            for (rails, limit) in [(1, u64::MAX), (3, u64::MAX), (2, 1 << 20), (8, 65_536), (1, 1)] {
                let piece = piece_of(span, rails, limit);
                // A limit that would take too many pieces is for the sender to refuse, not for the numbers to wrap.
                assert!(
                    piece <= limit || piece == span.div_ceil(MAX_PIECES),
                    "{span} {rails} {limit}: {piece}"
                );
                let off = (1 << 33) + 5;
                let targets = [Target { addr: u64::MAX - span, key: 1 }; MAX_RAILS];
                let mut grant = Grant { id: 7, off, span, piece, rails, tagged: false, targets };
                grant.targets[rails as usize..].fill(Target::default());
                let key = MsgKey { group: 1, seq: 2, tag: 3 };
                let call = PackedCall { count: span, ..bytemuck::Zeroable::zeroed() };
                let packet = Packet {
                    from: 1,
                    given: 0,
                    number: 9,
                    key,
                    call,
                    total: off + span,
                    body: Body::Grant(grant),
                };
                let mut out = [0; HEADER + 16 * MAX_RAILS];
                let len = encode(&packet, &mut out);
                assert_eq!(decode(&out[..len]), Some(packet));
                let mut next = off;
                for p in 0..grant.pieces() {
                    let (at, len) = grant.range(p);
                    assert!(at as u64 == next && len > 0 && len as u64 <= piece);
                    next += len as u64;
                }
                assert_eq!(next, off + span);
                let last = grant.pieces() - 1;
                assert!(grant.tag(last) & 0xff_ffff == u64::from(last) && grant.tag(last) >> 24 == 7);
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(
            from: u64, given: u32, number: u32, key in key(), call in call(), which in 0..10, flag: bool,
            data in prop::collection::vec(any::<u8>(), 0..300), text in ".{0,40}",
            (grant, total) in grants(),
        ) {
            let (body, total) = match which {
                0 => (Body::Eager { data: &data, permitted: flag }, data.len() as u64),
                1 => (Body::Announce, total),
                2 => (Body::Permit, total),
                3 => (Body::Grant(grant), total),
                4 => (Body::Probe { receiving: flag }, total),
                5 => (Body::Credit { answer: flag }, 0),
                6 => (Body::Abort { quiet: flag, text: &text }, 0),
                7 => (Body::Settled { rails: 3 }, total),
                8 => (Body::Gone, 0),
                _ => (Body::Bye, 0),
            };
            let packet = Packet { from, given, number, key, call, total, body };
            let mut out = [0xaa; HEADER + 400];
            let len = encode(&packet, &mut out);
            prop_assert_eq!(decode(&out[..len]), Some(packet));
            prop_assert_eq!(decode(&out[..len - 1]), None, "a cut message");
        }

        #[test]
        fn any_bytes_are_refused_or_keep_the_rules(
            mut bytes in prop::collection::vec(any::<u8>(), 0..300), honest: bool, kind in 0..12u8,
        ) {
            if honest && bytes.len() >= HEADER {
                bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
                bytes[4] = kind;
                bytes[5] &= 1;
                bytes[6] &= 15;
                let payload = (bytes.len() - HEADER) as u32;
                bytes[96..100].copy_from_slice(&payload.to_le_bytes());
                for at in [64, 72, 80, 88] {
                    bytes[at + 5..at + 8].fill(0);
                }
            }
            if let Some(Packet { body: Body::Grant(g), total, .. }) = decode(&bytes) {
                let pieces = g.pieces();
                prop_assert!(pieces >= 1 && u64::from(pieces) <= MAX_PIECES);
                let (first, _) = g.range(0);
                let (last, len) = g.range(pieces - 1);
                prop_assert!(first as u64 == g.off && (last + len) as u64 == g.off + g.span && len > 0);
                prop_assert!(g.off + g.span <= total);
                prop_assert!(g.rail(pieces - 1) < usize::from(g.rails));
            }
        }

        #[test]
        fn an_address_survives_and_any_bytes_do_not_panic(
            uid: u64, eager: u32, max_piece in 1..u64::MAX, rma: bool, bounces: bool, provider in "[a-z;_]{1,12}",
            rails in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 1..=MAX_RAILS),
            cut: prop::sample::Index, junk in prop::collection::vec(any::<u8>(), 0..100),
        ) {
            let address = Address { uid, eager, max_piece, rma, bounces, provider, rails };
            let bytes = address.encode();
            prop_assert_eq!(Address::decode(&bytes), Some(address.clone()));
            let cut = cut.index(bytes.len());
            prop_assert!(Address::decode(&bytes[..cut]).is_none_or(|a| a.rails.len() < address.rails.len()));
            let _ = Address::decode(&junk);
            let _ = Address::decode(&[ADDRESS_MAGIC.as_slice(), &junk].concat());
        }
    }
}
