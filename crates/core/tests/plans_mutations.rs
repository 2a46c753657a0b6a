//! The checker must see mistakes: right schedules are broken in one place, and the fault must name it.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::Arc;

use smddp_core::plan::check::{Fault, World};
use smddp_core::plan::{Buf, Op, Plan, Schedule, Span, Step, Who};
use smddp_core::plan::{CallShape, Override, Tuning};
use smddp_core::{Collective, GroupShape};

/// A proven world: 3 nodes of 2 ranks, several rounds and a rest.
fn world(algorithm: &str) -> World {
    build(Collective::AllReduce, algorithm, &GroupShape::even(3, 2), 61, 24 * 4)
}

fn build(collective: Collective, algorithm: &str, shape: &GroupShape, count: usize, chunk: usize) -> World {
    let overrides = Override::parse_all(&format!("{collective}={algorithm}")).unwrap();
    let tuning = Tuning { chunk, overrides, one_owner: 0, ..Tuning::default() };
    let world = World::new(shape, &CallShape::new(collective, 4, count), &tuning).unwrap();
    world.check().unwrap();
    world
}

/// Changes the body's plan of one rank.
fn mutate(schedule: &mut Schedule, change: impl FnOnce(&mut Plan)) {
    change(Arc::make_mut(&mut schedule.body));
}

/// The steps of a plan that `test` holds for.
fn steps(plan: &Plan, test: impl Fn(&Op) -> bool) -> Vec<usize> {
    (0..plan.steps.len()).filter(|&i| test(&plan.steps[i].op)).collect()
}

/// Takes a step out; what depended on it depends on what it depended on.
fn remove(plan: &mut Plan, step: usize) {
    let gone = plan.steps.remove(step);
    for s in &mut plan.steps {
        if s.after.contains(&(step as u32)) {
            s.after.extend(&gone.after);
            s.after.retain(|&a| a as usize != step);
        }
        s.after.iter_mut().filter(|a| **a as usize > step).for_each(|a| *a -= 1);
        s.after.sort_unstable();
        s.after.dedup();
    }
}

const ALGORITHMS: [&str; 5] = ["sharded", "ring", "recursive_doubling", "halving_doubling", "tree"];

/// Every dependency that orders a conflict is missed. (The builder adds no others, so each one matters.)
#[test]
fn a_dropped_dependency_is_a_race() {
    for algorithm in ALGORITHMS {
        let right = world(algorithm);
        let mut dropped = 0;
        for rank in [0, 3] {
            for step in 0..right.schedules[rank].body.steps.len() {
                for k in 0..right.schedules[rank].body.steps[step].after.len() {
                    let mut wrong = right.clone();
                    let mut on = 0;
                    mutate(&mut wrong.schedules[rank], |p| on = p.steps[step].after.remove(k) as usize);
                    // Another way may still lead from one to the other.
                    let fault = wrong.check();
                    let implied = right.schedules[rank].body.steps[step].after.iter().any(|&other| {
                        other as usize != on && reaches(&right.schedules[rank].body, other as usize, on)
                    });
                    match fault {
                        Err(Fault::Race { rank: r, first, second, apart: 0, .. }) => {
                            assert_eq!((r, first <= on, second >= step), (rank, true, true), "{algorithm}");
                            dropped += 1;
                        }
                        other => assert!(implied, "{algorithm}, rank {rank}, step {step} on {on}: {other:?}"),
                    }
                }
            }
        }
        assert!(dropped > 4, "{algorithm}: {dropped}");
    }
}

fn reaches(plan: &Plan, from: usize, to: usize) -> bool {
    plan.steps[from].after.iter().any(|&a| a as usize == to || reaches(plan, a as usize, to))
}

#[test]
fn a_dependency_on_what_comes_later_is_named() {
    let mut wrong = world("ring");
    mutate(&mut wrong.schedules[1], |p| p.steps[0].after.push(2));
    assert_eq!(wrong.check(), Err(Fault::Forward { rank: 1, step: 0, on: 2 }));
}

#[test]
fn operands_swapped_on_one_rank_are_another_association() {
    let mut wrong = world("recursive_doubling");
    for schedule in &mut wrong.schedules[4..5] {
        mutate(schedule, |p| {
            let reduce = steps(p, |op| matches!(op, Op::Reduce { .. })).pop().unwrap();
            let Op::Reduce { srcs, .. } = &mut p.steps[reduce].op else { unreachable!() };
            srcs.swap(0, 1);
        });
    }
    let fault = wrong.check().unwrap_err();
    assert!(matches!(fault, Fault::Association { .. }), "{fault}");
}

#[test]
fn a_wrong_offset_of_a_send_is_a_wrong_element() {
    for algorithm in ALGORITHMS {
        for (rank, by) in [(0, 4), (2, 8)] {
            let mut wrong = world(algorithm);
            mutate(&mut wrong.schedules[rank], |p| {
                let send = steps(p, |op| matches!(op, Op::Send { .. }))[0];
                let Op::Send { src, .. } = &mut p.steps[send].op else { unreachable!() };
                src.off = if src.off >= by { src.off - by } else { src.off + by };
            });
            let fault = wrong.check().unwrap_err();
            // Beyond what is ordered or written, before it is found to be another element.
            let seen = matches!(
                fault,
                Fault::Mixed { .. }
                    | Fault::WrongElement { .. }
                    | Fault::Race { .. }
                    | Fault::Undefined { .. }
                    | Fault::Bounds { .. }
            );
            assert!(seen, "{algorithm}: {fault}");
        }
    }
}

#[test]
fn a_dropped_step_of_any_kind_is_named() {
    for algorithm in ALGORITHMS {
        let right = world(algorithm);
        for rank in 0..6 {
            for step in 0..right.schedules[rank].body.steps.len() {
                let mut wrong = right.clone();
                mutate(&mut wrong.schedules[rank], |p| remove(p, step));
                let fault = wrong.check().expect_err(algorithm);
                let seen = match right.schedules[rank].body.steps[step].op {
                    Op::Phase(_) => matches!(fault, Fault::PhasesDiffer { node, .. } if node == rank / 2),
                    Op::Send { to, tag, .. } => {
                        matches!(fault, Fault::Unmatched { peer, place, tag: t, .. } if peer == rank && place.rank == to as usize && t == tag)
                    }
                    Op::Recv { from, tag, .. } => {
                        matches!(fault, Fault::Unmatched { peer, place, tag: t, .. } if peer == rank && place.rank == from as usize && t == tag)
                    }
                    // What it would have written is missing, or is still what it was.
                    Op::Reduce { .. } | Op::Copy { .. } => matches!(
                        fault,
                        Fault::Undefined { .. }
                            | Fault::WrongContributors { .. }
                            | Fault::Finish { .. }
                            | Fault::Twice { .. }
                            | Fault::WrongElement { .. }
                            | Fault::Mixed { .. }
                            | Fault::Race { .. }
                    ),
                };
                assert!(seen, "{algorithm}, rank {rank}, step {step}: {fault}");
            }
        }
    }
}

#[test]
fn a_contribution_taken_twice_is_named() {
    let mut wrong = world("sharded");
    mutate(&mut wrong.schedules[2], |p| {
        let reduce = steps(p, |op| matches!(op, Op::Reduce { .. }))[0];
        let Op::Reduce { srcs, .. } = &mut p.steps[reduce].op else { unreachable!() };
        srcs[1] = srcs[0];
    });
    let fault = wrong.check().unwrap_err();
    assert!(matches!(fault, Fault::Twice { place, contributor: 0, .. } if place.rank == 2), "{fault}");
}

#[test]
fn a_contribution_left_out_is_named() {
    let mut wrong = world("sharded");
    mutate(&mut wrong.schedules[2], |p| {
        let reduce = steps(p, |op| matches!(op, Op::Reduce { .. }))[0];
        let Op::Reduce { srcs, .. } = &mut p.steps[reduce].op else { unreachable!() };
        srcs.pop();
    });
    let fault = wrong.check().unwrap_err();
    assert!(matches!(&fault, Fault::WrongContributors { missing, .. } if *missing == [4, 5]), "{fault}");
}

#[test]
fn tags_used_twice_and_tags_that_never_meet_are_named() {
    let change = |to: u32, from: u32| {
        let mut wrong = world("sharded");
        mutate(&mut wrong.schedules[0], |p| {
            let sends = p.steps.iter_mut().filter_map(|s| match &mut s.op {
                Op::Send { tag, .. } => Some(tag),
                _ => None,
            });
            *sends.into_iter().find(|tag| **tag == from).unwrap() = to;
        });
        wrong.check().unwrap_err()
    };
    let twice = change(1, 0);
    assert!(matches!(twice, Fault::Tag { rank: 0, tag: 1, .. }), "{twice}");
    let alone = change(9, 0);
    assert!(matches!(alone, Fault::Unmatched { place, tag: 9, .. } if place.rank == 0), "{alone}");
}

#[test]
fn a_missing_finish_and_a_second_one_are_named() {
    for algorithm in ALGORITHMS {
        for rank in 0..6 {
            let mut wrong = world(algorithm);
            let mut changed = false;
            mutate(&mut wrong.schedules[rank], |p| {
                for s in &mut p.steps {
                    if let Op::Reduce { finish, .. } = &mut s.op {
                        changed |= *finish;
                        *finish = false;
                    }
                }
            });
            let fault = wrong.check();
            if changed {
                let fault = fault.unwrap_err();
                let seen = matches!(fault, Fault::Finish { finished: false, .. } | Fault::Association { .. });
                assert!(seen, "{algorithm}: {fault}");
            }
        }
        let mut wrong = world(algorithm);
        for rank in [0, 1] {
            mutate(&mut wrong.schedules[rank], |p| {
                let Op::Phase(moves) = &mut p.steps[0].op else { unreachable!() };
                moves.iter_mut().for_each(|m| m.finish = true);
            });
        }
        let fault = wrong.check().unwrap_err();
        assert!(matches!(fault, Fault::CombinedAfterFinish { .. }), "{algorithm}: {fault}");
    }
}

#[test]
fn one_byte_more_than_stated_over_the_link_is_named() {
    for algorithm in ["sharded", "recursive_doubling", "tree"] {
        let right = world(algorithm);
        let carried = right.check().unwrap();
        let most = carried.sent.max(carried.received);
        let mut seen = 0;
        for node in 0..3 {
            let mut wrong = right.clone();
            wrong.schedules[2 * node + 1].link_bytes = most - 1;
            if let Err(fault) = wrong.check() {
                assert!(
                    matches!(fault, Fault::Link { node: n, bytes, bound, .. } if n == node && bytes == most && bound == most - 1),
                    "{algorithm}: {fault}"
                );
                seen += 1;
            }
        }
        assert!(seen > 0, "{algorithm}");
    }
}

#[test]
fn unequal_lengths_are_named() {
    let mut wrong = world("ring");
    mutate(&mut wrong.schedules[0], |p| {
        let send = steps(p, |op| matches!(op, Op::Send { .. }))[0];
        let Op::Send { src, .. } = &mut p.steps[send].op else { unreachable!() };
        src.len -= 4;
    });
    let fault = wrong.check().unwrap_err();
    assert!(matches!(fault, Fault::Length { place, .. } if place.rank == 0), "{fault}");
}

/// Each waits for the other's data before it sends: a cycle, though every message has its counterpart.
#[test]
fn a_cycle_of_waits_is_a_deadlock_and_names_the_steps() {
    let mut wrong = build(Collective::AllReduce, "recursive_doubling", &GroupShape::even(2, 1), 4, 0);
    for rank in [0, 1] {
        mutate(&mut wrong.schedules[rank], |p| {
            let recv = steps(p, |op| matches!(op, Op::Recv { .. }))[0];
            let send = steps(p, |op| matches!(op, Op::Send { .. }))[0];
            assert!(recv < send);
            p.steps[send].after.push(recv as u32);
        });
    }
    let fault = wrong.check().unwrap_err();
    let Fault::Deadlock { count: 2, blocked } = &fault else { panic!("{fault}") };
    assert_eq!(blocked.iter().map(|b| b.place.rank).collect::<Vec<_>>(), [0, 1]);
}

/// A send is over when it was received: two that both wait for their own send before they receive never end.
#[test]
fn sends_that_need_a_buffering_transport_are_a_deadlock() {
    let mut wrong = build(Collective::AllReduce, "recursive_doubling", &GroupShape::even(2, 1), 4, 0);
    for rank in [0, 1] {
        mutate(&mut wrong.schedules[rank], |p| {
            p.steps.swap(0, 1);
            assert!(matches!(p.steps[0].op, Op::Send { .. }));
            p.steps[1].after.push(0);
        });
    }
    assert!(matches!(wrong.check(), Err(Fault::Deadlock { count: 2, .. })));
}

#[test]
fn a_window_too_small_for_the_lag_is_a_deadlock() {
    let mut wrong = world("sharded");
    for s in &mut wrong.schedules {
        assert!(s.rounds() > 1);
        (s.window, s.lag) = (1, 1);
    }
    let fault = wrong.check().unwrap_err();
    assert!(matches!(fault, Fault::Deadlock { .. }), "{fault}");
}

#[test]
fn phases_that_differ_are_named() {
    let mut wrong = world("sharded");
    mutate(&mut wrong.schedules[3], |p| {
        let Op::Phase(moves) = &mut p.steps[0].op else { unreachable!() };
        moves[0].to = Who::One(1);
    });
    assert!(matches!(wrong.check(), Err(Fault::PhasesDiffer { node: 1, rank: 2, other: 3, .. })));
    let mut wrong = world("sharded");
    wrong.schedules[5].lag += 1;
    assert!(matches!(wrong.check(), Err(Fault::PhasesDiffer { node: 2, .. })));
}

#[test]
fn rounds_in_flight_that_share_bytes_are_a_race() {
    let mut wrong = world("sharded");
    for s in &mut wrong.schedules {
        s.round_bytes -= 4;
    }
    let fault = wrong.check().unwrap_err();
    assert!(matches!(fault, Fault::Race { apart: 1, buf: Buf::Output, .. }), "{fault}");
}

#[test]
fn scratch_and_buffers_have_ends() {
    let mut wrong = world("sharded");
    mutate(&mut wrong.schedules[0], |p| p.scratch -= 64);
    assert!(matches!(wrong.check(), Err(Fault::Bounds { rank: 0, .. })));
    let mut wrong = world("sharded");
    wrong.calls.iter_mut().for_each(|c| c.count -= 1);
    assert!(matches!(wrong.check(), Err(Fault::Bounds { .. })));
}

#[test]
fn an_overwritten_input_is_named() {
    let mut wrong = build(Collective::ReduceScatter, "direct", &GroupShape::even(3, 2), 5, 0);
    mutate(&mut wrong.schedules[4], |p| {
        p.push(Op::Copy { dst: span(Buf::Input, 0), src: span(Buf::Input, 4) }, &[p.steps.len() as u32 - 1]);
    });
    let fault = wrong.check().unwrap_err();
    assert!(
        matches!(
            fault,
            Fault::Clobbered { rank: 4, buf: Buf::Input, element: 0 } | Fault::Race { rank: 4, .. }
        ),
        "{fault}"
    );
    let mut wrong = build(Collective::Reduce, "tree", &GroupShape::even(3, 1), 5, 0);
    mutate(&mut wrong.schedules[2], |p| {
        p.push(
            Op::Copy { dst: span(Buf::Output, 0), src: span(Buf::Output, 4) },
            &[p.steps.len() as u32 - 1],
        );
    });
    assert_eq!(wrong.check(), Err(Fault::Clobbered { rank: 2, buf: Buf::Output, element: 0 }));
}

fn span(buf: Buf, off: usize) -> smddp_core::plan::Span {
    smddp_core::plan::Span { buf, off, len: 4 }
}

#[test]
fn a_barrier_that_misses_a_rank_is_named() {
    let mut wrong = build(Collective::Barrier, "recursive_doubling", &GroupShape::even(3, 1), 0, 0);
    mutate(&mut wrong.schedules[0], |p| {
        let reduce = steps(p, |op| matches!(op, Op::Reduce { .. }))[0];
        let Op::Reduce { srcs, .. } = &mut p.steps[reduce].op else { unreachable!() };
        srcs.pop();
    });
    let fault = wrong.check().unwrap_err();
    assert!(matches!(&fault, Fault::WrongContributors { missing, .. } if *missing == [1]), "{fault}");
}

/// The output as a place for something else until the result is there: right, unless it is a part of the input.
#[test]
fn what_is_wrong_in_place_alone_is_named() {
    let mut world = build(Collective::ReduceScatter, "direct", &GroupShape::even(2, 1), 6, 0);
    mutate(&mut world.schedules[0], |p| {
        p.steps.iter_mut().flat_map(|s| &mut s.after).for_each(|a| *a += 1);
        let copy = Op::Copy { dst: Span::output(0, 24), src: Span::input(24, 24) };
        p.steps.insert(0, Step { op: copy, after: Vec::new() });
        let reduce = steps(p, |op| matches!(op, Op::Reduce { .. }))[0];
        p.steps[reduce].after.push(0);
    });
    assert!(world.check().is_ok());
    let fault = world.in_place().check().unwrap_err();
    assert!(matches!(fault, Fault::Mixed { place, .. } if place.rank == 0), "{fault}");
}
