use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;

use super::*;
use crate::single::LocalStore;

type Gathered = Result<Vec<Vec<u8>>>;

fn soon(seconds: f64) -> Instant {
    Instant::now() + Duration::from_secs_f64(seconds)
}

/// Runs all_gather for each (rank, bytes) in a thread of its own.
fn run(
    store: &Arc<LocalStore>,
    scope: &str,
    size: usize,
    ranks: &[(usize, &[u8])],
    seconds: f64,
) -> Vec<Gathered> {
    std::thread::scope(|threads| {
        let started: Vec<_> = ranks
            .iter()
            .map(|&(rank, bytes)| {
                let store = Arc::clone(store);
                threads.spawn(move || all_gather(&*store, scope, rank, size, bytes, soon(seconds)))
            })
            .collect();
        started.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

#[test]
fn everybody_gets_everything_in_rank_order() {
    for size in 1..6 {
        let store = Arc::new(LocalStore::new());
        let data: Vec<Vec<u8>> = (0..size).map(|r| vec![r as u8; r * 7]).collect();
        let ranks: Vec<(usize, &[u8])> =
            data.iter().enumerate().rev().map(|(r, d)| (r, d.as_slice())).collect();
        for result in run(&store, "g", size, &ranks, 60.0) {
            assert_eq!(result.unwrap(), data);
        }
    }
}

#[test]
fn the_missing_ranks_are_named_on_every_rank() {
    let store = Arc::new(LocalStore::new());
    for result in run(&store, "g", 5, &[(0, b"a"), (2, b"c"), (4, b"e")], 0.5) {
        match result {
            Err(Error::Missing { missing, scope, .. }) => {
                assert_eq!((missing, scope.as_str()), (vec![1, 3], "g"));
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_missing_leader_is_named_too() {
    let store = Arc::new(LocalStore::new());
    for result in run(&store, "g", 3, &[(1, b"b"), (2, b"c")], 0.3) {
        assert!(matches!(&result, Err(Error::Missing { missing, .. }) if missing == &[0]), "{result:?}");
    }
}

#[test]
fn a_leader_that_ended_before_it_gave_its_nonce_is_overtaken() {
    let store = Looked::default();
    // Its number is there and nothing else.
    store.add("g/lead", 1).unwrap();
    std::thread::scope(|threads| {
        let follower = threads.spawn(|| all_gather(&store, "g", 1, 2, b"b", soon(10.0)));
        // Once it has looked, it waits for the dead leader's nonce.
        while store.looks.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        let leader = all_gather(&store, "g", 0, 2, b"a", soon(10.0));
        assert_eq!(leader.unwrap(), [b"a", b"b"]);
        assert!(follower.join().unwrap().is_ok());
    });
}

/// Counts looks for leaders.
#[derive(Default)]
struct Looked {
    store: LocalStore,
    looks: AtomicUsize,
}

impl Store for Looked {
    fn set(&self, key: &str, value: &[u8]) -> smddp_core::Result<()> {
        self.store.set(key, value)
    }

    fn get(&self, key: &str, deadline: Instant) -> smddp_core::Result<Vec<u8>> {
        self.store.get(key, deadline)
    }

    fn add(&self, key: &str, amount: i64) -> smddp_core::Result<i64> {
        let number = self.store.add(key, amount)?;
        if key == "g/lead" && amount == 0 {
            self.looks.fetch_add(1, Ordering::SeqCst);
        }
        Ok(number)
    }
}

#[test]
fn two_processes_of_one_rank_are_found() {
    let store = Arc::new(LocalStore::new());
    let duplicate = |r: &Gathered| matches!(r, Err(Error::DuplicateRank { rank: 1, .. }));
    // While rank 2 is missing the leader sees both claims, and tells everybody.
    let results = run(&store, "g", 3, &[(0, b"a"), (1, b"b"), (1, b"x")], 2.0);
    assert!(results.iter().all(duplicate), "{results:?}");
    // Else one may have been served before the other came.
    for round in 0..20 {
        let scope = format!("h{round}");
        let results = run(&store, &scope, 3, &[(0, b"a"), (1, b"b"), (1, b"x"), (2, b"c")], 0.5);
        assert!(results[1..3].iter().any(duplicate), "{results:?}");
        assert!(results.iter().all(|r| r.is_ok() || duplicate(r)), "{results:?}");
    }
}

#[test]
fn two_leaders_are_found() {
    let store = Arc::new(LocalStore::new());
    let results = run(&store, "g", 2, &[(0, b"a"), (0, b"x")], 1.0);
    let duplicate = |r: &Gathered| matches!(r, Err(Error::DuplicateRank { rank: 0, .. }));
    assert!(results.iter().any(duplicate), "{results:?}");
}

/// Whatever subset of ranks a dead attempt consisted of, and whoever of the new one comes first, the new attempt
/// gets its own bytes only.
#[test]
fn leftovers_of_a_dead_attempt_are_not_taken_for_new() {
    for dead in [vec![0], vec![1], vec![0, 1], vec![1, 2], vec![0, 1, 2]] {
        let store = Arc::new(LocalStore::new());
        let old: Vec<(usize, &[u8])> = dead.iter().map(|&r| (r, b"old".as_slice())).collect();
        let complete = dead.len() == 3;
        for result in run(&store, "g", 3, &old, if complete { 60.0 } else { 0.2 }) {
            assert_eq!(result.is_ok(), complete);
        }
        // The leader comes last: followers meet the dead attempt's keys first.
        let early = Arc::clone(&store);
        let followers: Vec<_> = [1usize, 2]
            .map(|rank| {
                let store = Arc::clone(&early);
                std::thread::spawn(move || all_gather(&*store, "g", rank, 3, &[rank as u8], soon(60.0)))
            })
            .into_iter()
            .collect();
        std::thread::sleep(Duration::from_millis(300));
        let lead = all_gather(&*store, "g", 0, 3, &[0], soon(60.0));
        let expected = vec![vec![0], vec![1], vec![2]];
        assert_eq!(lead.unwrap(), expected, "dead {dead:?}");
        for follower in followers {
            assert_eq!(follower.join().unwrap().unwrap(), expected, "dead {dead:?}");
        }
    }
}

#[test]
fn ranks_that_disagree_about_the_size_are_told() {
    let store = Arc::new(LocalStore::new());
    let (a, b) = (Arc::clone(&store), Arc::clone(&store));
    let lead = std::thread::spawn(move || all_gather(&*a, "g", 0, 2, b"a", soon(5.0)));
    let follow = all_gather(&*b, "g", 1, 3, b"b", soon(5.0));
    assert!(follow.unwrap_err().to_string().contains("2 ranks by rank 0, 3 by rank 1"));
    assert!(lead.join().unwrap().is_ok());
}

proptest! {
    #[test]
    fn verdicts_read_back_and_garbage_does_not_panic(
        parts in prop::collection::vec((any::<u64>(), prop::collection::vec(any::<u8>(), 0..9)), 0..6),
        ranks in prop::collection::vec(0usize..99, 0..4),
        kind in DONE..=DUPLICATE,
        garbage: Vec<u8>,
    ) {
        let parts: Vec<Part> = parts.into_iter().map(|(mark, bytes)| Part { mark, bytes }).collect();
        let verdict = Verdict { kind, ranks, parts };
        let bytes = verdict.encode();
        prop_assert_eq!(Verdict::decode(&bytes), Some(verdict));
        prop_assert_eq!(Verdict::decode(&bytes[..bytes.len() - 1]), None);
        let _ = (Verdict::decode(&garbage), Part::decode(&garbage));
    }
}
