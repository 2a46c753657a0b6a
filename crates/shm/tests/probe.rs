//! The probe of slot sizes.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use smddp_shm::Geometry;
use smddp_shm::probe::{self, Load};

fn cores() -> Vec<usize> {
    let all = rustix::thread::sched_getaffinity(None).unwrap();
    (0..rustix::thread::CpuSet::MAX_CPU).filter(|&core| all.is_set(core)).collect()
}

#[test]
fn every_candidate_gets_a_time() {
    let candidates = [(Geometry::USUAL, true), (Geometry { slot: 64 << 10, slots: 2 }, false)];
    for load in [Load::Slots, Load::Blocks] {
        let times = probe::time(load, &candidates, &cores(), Duration::from_secs(60)).unwrap().unwrap();
        assert_eq!(times.len(), candidates.len());
        assert!(times.iter().all(|&t| t > 0.0 && t.is_finite()), "{load:?}: {times:?}");
    }
}

#[test]
fn it_ends_at_its_limit_without_a_result() {
    let many = [(Geometry::USUAL, true); 8];
    assert!(probe::time(Load::Slots, &many, &cores(), Duration::ZERO).unwrap().is_none());
}

#[test]
fn cores_that_cannot_be_used_are_an_error_and_no_wait() {
    let error = probe::time(Load::Slots, &[(Geometry::USUAL, true)], &[], Duration::from_secs(3600))
        .unwrap_err()
        .to_string();
    assert!(error.contains("cannot run on cores []"), "{error}");
}
