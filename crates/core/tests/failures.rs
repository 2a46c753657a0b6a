//! Which operation gets which error, and what a panic leaves.

#![allow(clippy::unwrap_used)]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{groups, on_all};
use smddp_core::communicator::Communicator;
use smddp_core::engine::Engine;
use smddp_core::engine::execution::Route;
use smddp_core::engine::group::Seat;
use smddp_core::engine::idle::LIVENESS;
use smddp_core::engine::op::GroupKey;
use smddp_core::plan::Tuning;
use smddp_core::request::Request;
use smddp_core::settings::Settings;
use smddp_core::shared::Shared;
use smddp_core::testing::{MemoryFabric, MemoryNode};
use smddp_core::transport::{Bell, Ctx, Gone, Message, MsgKey, NodeLocal, PhaseRun, Transports};
use smddp_core::{Collective, DType, Error, GroupShape, Region, Result};

const LONG: Duration = Duration::from_secs(3600);
const SHORT: Duration = Duration::from_millis(50);

fn sum(data: &mut [f32], timeout: Duration) -> Request {
    let count = data.len();
    // SAFETY: the tests' data outlives their groups' work.
    let region = unsafe { Region::of(data) };
    let request = Request::new(Collective::AllReduce, DType::F32, count, region, region);
    Request { timeout: Some(timeout), ..request }
}

fn is_told(result: Result<()>) -> bool {
    matches!(result, Err(Error::Aborted { reason, .. }) if reason.contains("the group failed before"))
}

/// Who only knows that another node's rank has not come waits a little longer, for the word of one that knows more: so do the calls
/// behind that one, which would be blamed for it else.
#[test]
fn the_call_that_is_stuck_gets_the_timeout_not_one_behind_it() {
    let limit = Duration::from_millis(400);
    for shape in [GroupShape::even(1, 2), GroupShape::even(2, 1)] {
        let groups = groups(&shape, 1, &Tuning::default());
        let mut data = [[1f32; 4]; 2];
        // SAFETY: `data` outlives the work.
        let [first, second] =
            data.each_mut().map(|data| unsafe { groups[0].start(&sum(data, limit)) }.unwrap());
        let error = first.wait(None).unwrap_err();
        assert!(matches!(&error, Error::Timeout { site, .. } if site.seq == 0), "{error}");
        assert!(is_told(second.wait(None)));
    }
}

/// Limits are each call's own, however many wait before it.
#[test]
fn the_call_whose_limit_passes_gets_the_timeout() {
    let shapes = [GroupShape::even(1, 2), GroupShape::even(2, 1)];
    for (shape, queued) in shapes.iter().flat_map(|shape| (0..3).map(move |queued| (shape, queued))) {
        let groups = groups(shape, 1, &Tuning::default());
        let mut data = [[1f32; 4]; 4];
        let [last, before @ ..] = &mut data;
        // SAFETY: `data` outlives the work.
        let start = |data: &mut [f32], limit| unsafe { groups[0].start(&sum(data, limit)) }.unwrap();
        let before: Vec<_> = before.iter_mut().take(queued).map(|data| start(data, LONG)).collect();
        let last = start(last, SHORT);
        let error = last.wait(None).unwrap_err();
        assert!(matches!(&error, Error::Timeout { waited, .. } if *waited >= SHORT), "{error}");
        assert!(before.into_iter().all(|handle| is_told(handle.wait(None))));
    }
}

#[test]
fn limits_beyond_the_clocks_are_none() {
    let groups = groups(&GroupShape::even(1, 2), 3, &Tuning::default());
    on_all(&groups, |g| {
        let mut data = [1f32; 4];
        // The peer comes late: the call becomes an operation.
        std::thread::sleep(SHORT * g.rank() as u32);
        let request = sum(&mut data, Duration::MAX);
        // SAFETY: `data` outlives the call, which has no limit.
        assert!(unsafe { g.run_for(&request, Duration::MAX) }.unwrap().is_none());
        // SAFETY: as above.
        unsafe { g.start(&request) }.unwrap().wait(Some(Duration::MAX)).unwrap();
        assert_eq!(data, [4.0; 4]);
    });
}

#[test]
fn requests_that_would_be_misread_are_refused() {
    let groups = groups(&GroupShape::even(1, 2), 4, &Tuning::default());
    let (mut a, mut b) = ([1f32; 2], [2f32; 2]);
    // SAFETY: both outlive the calls.
    let (a, b) = unsafe { (Region::of(&mut a), Region::of(&mut b)) };
    let refused = |request: Request| {
        // SAFETY: as above.
        let error = unsafe { groups[0].run(&request) }.unwrap_err();
        matches!(error, Error::Argument { .. })
    };
    for collective in [Collective::AllReduce, Collective::Reduce, Collective::Broadcast] {
        assert!(refused(Request::new(collective, DType::F32, 2, a, b)), "{collective}");
    }
    // As many as one altogether, where numbers wrap around.
    let counts = Some([2, usize::MAX].into());
    let gather = Request::new(Collective::AllGather, DType::U8, 0, a.slice(0, 2), b.slice(0, 1));
    assert!(refused(Request { counts, ..gather }));
    assert!(
        groups[0].all_to_all_uneven(&[0u8; 1], &[usize::MAX, 2], &mut [0u8; 1], &[usize::MAX, 2]).is_err()
    );
    // Nothing of it has harmed the group.
    on_all(&groups, |g| g.barrier().unwrap());
}

/// Of a program in another language, say, where any byte but zero is true.
#[test]
fn truth_values_that_come_are_truth_values() {
    let groups = groups(&GroupShape::even(1, 2), 5, &Tuning::default());
    on_all(&groups, |g| {
        let mut bytes = [0u8, 1, 2, 255];
        // SAFETY: outlives the calls.
        let region = unsafe { Region::of(&mut bytes) };
        if g.rank() == 1 {
            let request = Request::new(Collective::Broadcast, DType::Bool, 4, region, region);
            // SAFETY: as above.
            unsafe { g.run(&Request { root: 1, ..request }).unwrap() };
            // SAFETY: as above.
            return unsafe { g.start_send(0, 0, DType::Bool, region) }.unwrap().wait(None).unwrap();
        }
        let as_bytes = |values: &[bool; 4]| values.map(u8::from);
        let (mut from_all, mut from_one) = ([false; 4], [false; 4]);
        g.broadcast(&mut from_all, 1).unwrap();
        g.recv(&mut from_one, 1, 0).unwrap();
        assert_eq!([as_bytes(&from_all), as_bytes(&from_one)], [[0, 1, 1, 1]; 2]);
    });
}

/// What becomes of a [`Frail`].
#[derive(Default)]
struct Fate {
    polls_panic: AtomicBool,
    receives_panic: AtomicBool,
    /// Local ranks that are gone.
    gone: Mutex<Vec<(usize, Gone)>>,
    /// It has told its peers.
    aborted: AtomicBool,
}

/// A node that does as it is told.
struct Frail {
    node: MemoryNode,
    fate: Arc<Fate>,
}

impl NodeLocal for Frail {
    fn describe(&self) -> String {
        self.node.describe()
    }

    fn submit(&mut self, run: PhaseRun) -> Result<()> {
        self.node.submit(run)
    }
    fn enter_shared(&mut self, shared: Shared) -> Result<()> {
        self.node.enter_shared(shared)
    }
    fn send(&mut self, message: Message) -> Result<()> {
        self.node.send(message)
    }
    fn recv(&mut self, message: Message) -> Result<()> {
        if self.fate.receives_panic.load(Ordering::Relaxed) {
            // By then whoever was called to this work has found that the seat is taken.
            std::thread::sleep(SHORT);
            panic!("as it happens");
        }
        self.node.recv(message)
    }
    fn has_come(&mut self, peer: u32, key: &MsgKey) -> bool {
        self.node.has_come(peer, key)
    }
    fn poll(&mut self, done: &mut Vec<Ctx>) -> Result<bool> {
        assert!(!self.fate.polls_panic.load(Ordering::Relaxed), "as it happens");
        self.node.poll(done)
    }
    fn arm(&mut self) {
        self.node.arm();
    }
    fn disarm(&mut self) {
        self.node.disarm();
    }
    fn bell(&self) -> Arc<dyn Bell> {
        self.node.bell()
    }
    fn waiting_for(&self) -> Vec<usize> {
        self.node.waiting_for()
    }
    fn lost_peer(&mut self) -> Option<(usize, Gone)> {
        let waited_for = self.node.waiting_for();
        self.fate.gone.lock().unwrap().iter().copied().find(|(peer, _)| waited_for.contains(peer))
    }
    fn gone(&mut self, peer: usize) -> Option<Gone> {
        self.fate.gone.lock().unwrap().iter().find(|(gone, _)| *gone == peer).map(|(_, how)| *how)
    }
    fn abort(&mut self, why: &Error) {
        self.fate.aborted.store(true, Ordering::Relaxed);
        self.node.abort(why);
    }
}

struct FrailTransports;

impl Transports for FrailTransports {
    type Local = Frail;
    type Fabric = MemoryFabric;
}

/// One rank of several of a node, whose peers are never heard of.
fn frail(ranks: usize) -> (Communicator<FrailTransports>, Arc<Fate>, Arc<Engine<FrailTransports>>) {
    let shape = Arc::new(GroupShape::even(1, ranks));
    let fate = Arc::<Fate>::default();
    let local = Frail { node: MemoryNode::new(ranks, 6).remove(0), fate: Arc::clone(&fate) };
    let routes = (0..ranks as u32).map(Route::Local).collect();
    let seat = Seat { id: 7, name: "test".into(), rank: 0, shape, local, routes };
    let engine = Arc::new(Engine::new(&Settings::default()).unwrap());
    (Communicator::new(Arc::clone(&engine), seat, Tuning::default(), LONG).unwrap(), fate, engine)
}

/// Of messages that the rank lost may have sent, and of no other.
#[test]
fn messages_with_a_rank_that_is_lost_fail_for_it() {
    let mut data = [0u8; 32];
    // SAFETY: `data` outlives the work.
    let region = unsafe { Region::of(&mut data) };
    let (group, fate, _) = frail(4);
    // SAFETY: as above.
    let recv =
        |from, at, len| unsafe { group.start_recv(from, 0, DType::U8, region.slice(at, len)) }.unwrap();
    let others = [recv(1, 0, 4), recv(3, 4, 8)];
    // SAFETY: as above.
    let any = unsafe { group.start_recv_any(5, DType::U8, region.slice(12, 4)) }.unwrap();
    let lost = recv(2, 16, 8);
    fate.gone.lock().unwrap().push((2, Gone::Ended));
    for handle in [&lost, &any] {
        let error = handle.wait(None).unwrap_err();
        assert!(matches!(error, Error::PeerLost { peer: 2, .. }), "{error}");
    }
    assert!(others.into_iter().all(|handle| is_told(handle.wait(None))));
}

/// One that has the group fail as a whole names an operation that waits for the rank.
#[test]
fn the_failure_of_a_group_names_what_waits_for_the_rank_that_is_lost() {
    let mut data = [0u8; 12];
    // SAFETY: `data` outlives the work.
    let region = unsafe { Region::of(&mut data) };
    let (group, fate, _) = frail(3);
    // SAFETY: as above.
    let recv =
        |from, at, len| unsafe { group.start_recv(from, 0, DType::U8, region.slice(at, len)) }.unwrap();
    let (other, lost) = (recv(1, 0, 4), recv(2, 4, 8));
    fate.gone.lock().unwrap().push((2, Gone::Ended));
    let error = lost.wait(None).unwrap_err();
    assert_eq!(group.failure(), Some(error));
    assert!(is_told(other.wait(None)));
}

/// G2.
#[test]
fn receives_from_any_rank_fail_when_nobody_is_left_to_send() {
    for (last, reason) in [(Gone::Left, "no rank is left"), (Gone::Ended, "its process has ended")] {
        let mut data = [0u8; 4];
        let (group, fate, _) = frail(3);
        // SAFETY: `data` outlives the work.
        let any = unsafe { group.start_recv_any(0, DType::U8, Region::of(&mut data)) }.unwrap();
        fate.gone.lock().unwrap().push((1, Gone::Left));
        let waits = any.wait(Some(4 * LIVENESS));
        assert!(matches!(waits, Err(Error::Timeout { .. })) && !any.is_done(), "rank 2 may send yet");
        fate.gone.lock().unwrap().push((2, last));
        let error = any.wait(None).unwrap_err();
        assert!(matches!(&error, Error::PeerLost { reason: r, .. } if r.contains(reason)), "{error}");
    }
}

/// Messages have the same name where they have the same number and length: with other ranks, of another tag, the other way.
#[test]
fn the_message_whose_limit_passes_gets_the_timeout() {
    let mut data = [[0u8; 4]; 4];
    // SAFETY: `data` outlives the work.
    let [a, b, c, d] = data.each_mut().map(|data| unsafe { Region::of(data) });
    let groups = groups(&GroupShape::even(1, 3), 8, &Tuning::default());
    let group = &groups[0];
    // SAFETY: as above.
    let (others, late) = unsafe {
        let others = [
            group.start_recv(1, 0, DType::U8, a).unwrap(),
            group.start_recv(2, 1, DType::U8, b).unwrap(),
            group.start_send(2, 0, DType::U8, c).unwrap(),
        ];
        (others, group.start_recv(2, 0, DType::U8, d).unwrap())
    };
    late.set_timeout(SHORT);
    let error = late.wait(None).unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
    for handle in others {
        let result = handle.wait(None);
        assert!(is_told(result.clone()), "{result:?}");
    }
}

/// E7, where work that was left to who has the seat panics as it is taken up.
#[test]
fn a_panic_as_work_is_taken_up_fails_it_too() {
    let mut data = [0u8; 8];
    // SAFETY: `data` outlives the work.
    let region = unsafe { Region::of(&mut data) };
    // The progress thread is faster now and then.
    for _ in 0..10 {
        let (group, fate, engine) = frail(2);
        fate.receives_panic.store(true, Ordering::Relaxed);
        // SAFETY: as above.
        let recv = |at| unsafe { group.start_recv(1, 0, DType::U8, region.slice(at, 4)) };
        let (tell, told) = std::sync::mpsc::channel();
        engine
            .with_local(GroupKey { index: 0, id: 7 }, |_| {
                let left = std::thread::scope(|scope| scope.spawn(|| recv(0)).join().unwrap()).unwrap();
                left.on_done(Box::new(move |result| tell.send(result.clone()).unwrap()));
                Ok(())
            })
            .unwrap();
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| recv(4)));
        let result = told.recv_timeout(Duration::from_secs(60)).expect("nobody was told");
        assert!(result.is_err() && fate.aborted.load(Ordering::Relaxed));
    }
}

/// E7: whoever drives, nobody has his memory back before the peers have been told.
#[test]
fn a_panic_fails_what_is_under_way_after_peers_were_told() {
    for by_caller in [true, false] {
        let (group, fate, _) = frail(2);
        let (mut data, mut more) = ([1f32; 4], [1f32; 4]);
        // SAFETY: `data` outlives the work.
        let handle = unsafe { group.start(&sum(&mut data, LONG)) }.unwrap();
        let told = Arc::<AtomicBool>::default();
        let (tell, by_then) = (Arc::clone(&told), Arc::clone(&fate));
        handle.on_done(Box::new(move |result: &Result<()>| {
            assert!(result.is_err() && by_then.aborted.load(Ordering::Relaxed));
            tell.store(true, Ordering::Relaxed);
        }));
        fate.polls_panic.store(true, Ordering::Relaxed);
        let wait = || handle.wait(Some(LONG));
        if by_caller {
            let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(wait));
            // Unless the progress thread was faster.
            assert!(caught.is_err() || caught.is_ok_and(|result| result.is_err()));
        }
        let begun = Instant::now();
        while !told.load(Ordering::Relaxed) {
            assert!(begun.elapsed() < Duration::from_secs(60), "nobody was told");
            std::thread::sleep(Duration::from_millis(1));
        }
        // Later ones are refused, and their callbacks run.
        // SAFETY: as above.
        let later = unsafe { group.start(&sum(&mut more, LONG)) };
        assert!(later.is_err() || later.is_ok_and(|handle| handle.wait(None).is_err()));
        group.shutdown();
        assert!(group.failure().is_some());
        // The group's transport has gone with it, though there are handles yet.
        assert_eq!(Arc::strong_count(&fate), 1);
    }
}
