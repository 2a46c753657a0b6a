//! What a peer's cells may hold that no sender of ours would write: rank 1's are filled by hand.

use bytemuck::Zeroable;
use proptest::prelude::*;
use smddp_core::call::{Call, Collective};
use smddp_core::dtype::DType;

use super::*;
use crate::geometry::{Agreed, Geometry, Layout};
use crate::reach::Reach;

const KEY: MsgKey = MsgKey { group: 7, seq: MsgKey::P2P | 3, tag: 2 };
const OTHER: MsgKey = MsgKey { tag: 5, ..KEY };

/// Rank 0, to which anything can be sent as by rank 1.
struct Victim {
    segment: Segment,
    messages: Messages,
    forger: Place,
}

impl Victim {
    fn new() -> Victim {
        let layout = Layout::new(Geometry { slot: 4096, slots: 2 }.fitted(2), 2);
        let (segment, _file) = Segment::create(layout, 7, Agreed::default(), 1).unwrap();
        let own = i32::try_from(std::process::id()).ok();
        let copier = Copier::new(0, Reach::new(0, vec![own; 2]), true);
        let messages = Messages::new(0, &segment, Pen::new(false), false, copier);
        Victim { segment, messages, forger: Place::default() }
    }

    /// Bytes behind a cell's head.
    fn room(&self) -> usize {
        self.segment.cell_data(1, 0, 0).len()
    }

    fn expect(&mut self, key: MsgKey, bytes: &mut [u8]) -> Result<()> {
        self.messages.recv(Victim::message(key, bytes), &self.segment)
    }

    fn message(key: MsgKey, bytes: &mut [u8]) -> Message {
        // SAFETY: every test keeps the bytes while it polls.
        let region = unsafe { Region::of(bytes) };
        Message { key, peer: 1, peer_rank: 11, region, call: call(), ctx: Ctx(1) }
    }

    /// Whether a message is received on the spot; `None`: nothing lies there.
    fn receive_now(&mut self, key: MsgKey, bytes: &mut [u8]) -> Option<bool> {
        self.messages.recv_now(&Victim::message(key, bytes), &self.segment)
    }

    fn has_room(&self) -> bool {
        let index = self.forger.index(self.messages.cells);
        self.forger.is_free(self.segment.cell(1, 0, index), self.messages.cells)
    }

    /// As many as there are cells, before the next poll.
    fn forge(&mut self, frame: Frame, data: &[u8]) {
        let index = self.forger.index(self.messages.cells);
        let mut data = data.to_vec();
        // SAFETY: `data` is this function's alone.
        let from = unsafe { Region::of(&mut data) };
        self.segment.cell_data(1, 0, index).slice(0, from.len()).copy_from(from);
        assert!(self.has_room(), "rank 0 has not taken what came before");
        let cell = self.segment.cell(1, 0, index);
        self.forger.publish(cell, self.messages.cells, frame);
    }

    fn poll(&mut self) -> Result<Vec<Ctx>> {
        let mut done = Vec::new();
        self.messages.poll(&self.segment, false, &mut done)?;
        Ok(done)
    }
}

fn call() -> PackedCall {
    Call::new(Collective::SendRecv, DType::U8, 100).pack()
}

fn frame(total: usize, len: usize) -> Frame {
    Frame { key: KEY, call: call(), total: total as u64, len: len as u32, offer: 0 }
}

fn offer(total: u64, deal: u32) -> Frame {
    Frame { offer: deal + 1, total, ..frame(0, OFFER) }
}

/// Frames of which the last must be refused with `what`, where a message of `expected` bytes is waited for.
fn refused(what: &str, expected: usize, frames: &[Frame]) {
    let mut victim = Victim::new();
    // What lies behind its place in memory is nobody's to write.
    let mut memory = vec![0xee; expected + 4096];
    victim.expect(KEY, &mut memory[..expected]).unwrap();
    for frame in frames {
        victim.forge(*frame, &[0x11; OFFER]);
    }
    let error = victim.poll().unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::Transport { transport: "shared memory", .. }), "{text}");
    assert!(text.contains("local rank 1 sent a frame that") && text.contains(what), "not '{what}': {text}");
    assert!(memory[expected..].iter().all(|&byte| byte == 0xee), "{what}: wrote behind the message");
}

#[test]
fn a_frame_longer_than_its_cell_or_message_is_refused() {
    let room = Victim::new().room();
    let exceeds = "exceeds its cell or message";
    refused(exceeds, 100, &[frame(100, 101)]);
    refused(exceeds, 4 * room, &[frame(4 * room, room + 1)]);
    refused(exceeds, 4 * room, &[frame(4 * room, u32::MAX as usize)]);
    refused(exceeds, 100, &[frame(100, 60), frame(100, 41)]);
    refused(exceeds, 0, &[frame(0, 1)]);
    // One that is not waited for yet.
    refused(exceeds, 100, &[Frame { key: OTHER, ..frame(50, 51) }]);
}

/// Until then nothing is touched: what is not as it should be is for the poll to judge, and what is wanted elsewhere to hold.
#[test]
fn only_the_message_that_is_wanted_is_received_on_the_spot() {
    let room = Victim::new().room();
    let others = [
        Frame { key: OTHER, ..frame(100, 100) },
        frame(101, 101),
        frame(100, 60),
        frame(100, 101),
        frame(4 * room, room),
        Frame { call: Call::new(Collective::SendRecv, DType::I8, 100).pack(), ..frame(100, 100) },
        Frame { offer: 1, ..frame(100, 100) },
    ];
    for other in others {
        let (mut victim, mut memory) = (Victim::new(), [0xee; 100]);
        assert_eq!(victim.receive_now(KEY, &mut memory), None);
        victim.forge(other, &[0x11; 100]);
        assert_eq!(victim.receive_now(KEY, &mut memory), Some(false), "{other:?}");
        assert_eq!(memory, [0xee; 100], "{other:?}");
    }
    let (mut victim, mut memory) = (Victim::new(), [0xee; 100]);
    victim.forge(frame(100, 100), &[0x11; 100]);
    assert_eq!(victim.receive_now(KEY, &mut memory), Some(true));
    assert_eq!((memory, victim.receive_now(KEY, &mut memory)), ([0x11; 100], None));
    // Its cell is the peer's again.
    (0..victim.messages.cells).for_each(|_| victim.forge(frame(100, 100), &[0x22; 100]));
}

/// It came before, and waits in a buffer; or another is still arriving.
#[test]
fn what_is_not_the_next_cells_whole_is_not_received_on_the_spot() {
    let (mut victim, mut memory) = (Victim::new(), [[0u8; 100]; 2]);
    let [first, second] = &mut memory;
    victim.expect(OTHER, first).unwrap();
    victim.forge(frame(100, 100), &[0x11; 100]);
    victim.poll().unwrap();
    assert_eq!(victim.receive_now(KEY, second), Some(false), "it lies in a buffer");
    victim.expect(KEY, second).unwrap();
    victim.forge(Frame { key: OTHER, ..frame(100, 60) }, &[0x22; 60]);
    assert_eq!(victim.poll().unwrap(), [Ctx(1)]);
    assert_eq!(victim.receive_now(MsgKey { tag: 9, ..KEY }, second), Some(false), "another is arriving");
    assert_eq!(second, &[0x11; 100]);
}

/// One cell, one message, none before it; else nothing is done.
#[test]
fn what_fits_the_next_cell_is_sent_on_the_spot() {
    let mut victim = Victim::new();
    let (room, cells) = (victim.room(), victim.messages.cells);
    let mut data = vec![0x11; room + 1];
    assert!(!victim.messages.send_now(&Victim::message(KEY, &mut data), &victim.segment), "too long");
    for sent in 0..=cells {
        let message = Victim::message(KEY, &mut data[..100]);
        assert_eq!(victim.messages.send_now(&message, &victim.segment), sent < cells, "message {sent}");
    }
    let mut reader = Place::default();
    for index in 0..cells {
        let cell = victim.segment.cell(0, 1, index);
        assert_eq!(reader.arrived(cell, cells), Some(frame(100, 100)));
        reader.release(cell, cells);
    }
    let queued = Victim::message(OTHER, &mut data[..100]);
    victim.messages.send(queued).unwrap();
    let behind = Victim::message(KEY, &mut data[..100]);
    assert!(!victim.messages.send_now(&behind, &victim.segment), "one comes before it");
}

#[test]
fn a_frame_in_the_midst_of_another_message_is_refused() {
    let other = "does not continue its message";
    let begun = frame(100, 60);
    refused(other, 100, &[begun, Frame { key: OTHER, ..frame(100, 40) }]);
    refused(other, 100, &[begun, Frame { total: 99, ..frame(100, 39) }]);
    refused(other, 100, &[begun, Frame { total: u64::MAX, ..frame(100, 40) }]);
    // Nor may one that nobody waits for yet be broken off.
    let early = Frame { key: OTHER, ..frame(100, 60) };
    refused(other, 100, &[early, frame(100, 100)]);
}

#[test]
fn an_offer_by_no_deal_or_in_the_midst_of_a_message_is_refused() {
    let senseless = "makes no sense";
    let total = 1 << 20;
    refused(senseless, 1 << 20, &[offer(total, DEALS as u32)]);
    refused(senseless, 1 << 20, &[Frame { offer: u32::MAX, ..offer(total, 0) }]);
    refused(senseless, 1 << 20, &[Frame { len: OFFER as u32 + 1, ..offer(total, 0) }]);
    refused(senseless, 1 << 20, &[Frame { len: 0, ..offer(total, 0) }]);
    refused(senseless, 100, &[frame(100, 60), offer(total, 0)]);
    // A deal has one message at a time, whether it is waited for or not.
    let early = |deal| Frame { key: OTHER, ..offer(total, deal) };
    refused(senseless, 1 << 20, &[early(1), early(1)]);
    refused(senseless, 1 << 20, &[early(0), early(1), offer(total, 1)]);
}

#[test]
fn a_length_beyond_all_memory_is_an_error_and_no_crash() {
    for total in [u64::MAX, isize::MAX as u64 + 1, 1 << 46] {
        let mut victim = Victim::new();
        let mut memory = [0u8; 8];
        victim.expect(OTHER, &mut memory).unwrap();
        victim.forge(Frame { total, ..frame(0, 8) }, &[1; 8]);
        match victim.poll() {
            Err(error) => assert!(matches!(error, Error::Resource { resource: "memory", .. }), "{error}"),
            // A system that promises more than it has: nothing of it was touched.
            Ok(done) => assert!(done.is_empty() && total < isize::MAX as u64),
        }
        // One that is waited for, and one that is only offered, are compared with what is waited for.
        for forged in [Frame { total, ..frame(0, 8) }, offer(total, 0)] {
            for early in [false, true] {
                let mut victim = Victim::new();
                let mut memory = [0u8; 8];
                if !early {
                    victim.expect(KEY, &mut memory).unwrap();
                } else if forged.offer == 0 {
                    continue;
                } else {
                    victim.messages.has_come(1, &KEY);
                }
                victim.forge(forged, &[1; 8]);
                let error = match victim.poll() {
                    Ok(_) => victim.expect(KEY, &mut memory).unwrap_err(),
                    Err(error) => error,
                };
                assert!(matches!(error, Error::Mismatch { peer: 11, .. }), "{error}");
                assert_eq!(memory, [0; 8]);
            }
        }
    }
}

fn frames() -> impl Strategy<Value = Vec<Frame>> {
    let key = prop_oneof![6 => Just(KEY), 3 => Just(OTHER), 1 => Just(MsgKey::zeroed())];
    let total = prop_oneof![4 => Just(100u64), 2 => 0..200u64, 1 => 0..20_000u64, 1 => any::<u64>()];
    let len = prop_oneof![4 => 0..110u32, 1 => Just(8u32), 1 => 3900..4200u32, 1 => any::<u32>()];
    let offer = prop_oneof![6 => Just(0u32), 3 => 1..7u32, 1 => any::<u32>()];
    let call = prop_oneof![
        6 => Just(call()),
        1 => any::<([u8; 4], u32, u64)>().prop_map(|(b, root, count)| PackedCall {
            collective: b[0], dtype: b[1], op: b[2], form: b[3], root, count,
        }),
    ];
    let one = (key, total, len, offer, call).prop_map(|(key, total, len, offer, call)| Frame {
        key,
        call,
        total,
        len,
        offer,
    });
    prop::collection::vec(one, 1..24)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]
    /// Whatever a peer writes: no panic, and no byte outside of what it was let in for.
    #[test]
    fn any_frames_do_no_harm(frames in frames()) {
        let mut victim = Victim::new();
        let mut memory = vec![vec![0xee; 4096 + 100]; 3];
        // Lengths that a forged frame can meet, and one behind the other.
        for (bytes, (key, len)) in memory.iter_mut().zip([(KEY, 100), (OTHER, 100), (KEY, 8)]) {
            victim.expect(key, &mut bytes[..len]).unwrap();
        }
        for frame in frames {
            // Once nothing more is waited for, cells stay full.
            if !victim.has_room() {
                break;
            }
            victim.forge(frame, &[0x11; 100]);
            if victim.poll().is_err() {
                break;
            }
        }
        for (bytes, len) in memory.iter().zip([100, 100, 8]) {
            prop_assert!(bytes[len..].iter().all(|&byte| byte == 0xee));
        }
        // It says who is missing without a panic, too.
        let _ = victim.messages.waiting_for(&victim.segment).count();
    }
}
