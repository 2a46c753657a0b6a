//! The probe of slot sizes.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use smddp_core::order::Order;
use smddp_shm::Geometry;
use smddp_shm::probe;

fn cores() -> Vec<usize> {
    let all = rustix::thread::sched_getaffinity(None).unwrap();
    (0..rustix::thread::CpuSet::MAX_CPU).filter(|&core| all.is_set(core)).collect()
}

#[test]
fn every_candidate_gets_a_time() {
    let candidates = [Geometry::USUAL, Geometry { slot: 64 << 10, slots: 2 }];
    let slots =
        probe::slots(&candidates, Order::FourPages, &cores(), Duration::from_secs(60)).unwrap().unwrap();
    assert_eq!(slots.len(), candidates.len());
    let blocks = probe::blocks(Geometry::USUAL, true, Order::Straight, &cores(), Duration::from_secs(60))
        .unwrap()
        .unwrap();
    let all = slots
        .iter()
        .flat_map(|t| [t.all_reduce, t.broadcast, t.handed_back])
        .chain(blocks.iter().flat_map(|t| [t.mutual, t.alone]));
    assert!(all.into_iter().all(|t| t > 0.0 && t.is_finite()), "{slots:?} {blocks:?}");
}

#[test]
fn it_ends_at_its_limit_without_a_result() {
    assert!(
        probe::slots(&[Geometry::USUAL; 8], Order::Straight, &cores(), Duration::ZERO).unwrap().is_none()
    );
    assert!(
        probe::blocks(Geometry::USUAL, true, Order::Straight, &cores(), Duration::ZERO).unwrap().is_none()
    );
}

#[test]
fn cores_that_cannot_be_used_are_an_error_and_no_wait() {
    let error = probe::slots(&[Geometry::USUAL], Order::Straight, &[], Duration::from_secs(3600))
        .unwrap_err()
        .to_string();
    assert!(error.contains("cannot run on cores []"), "{error}");
}
