//! Once warm, neither phases nor messages allocate.
#![cfg(not(loom))]
// Tests may unwrap: a panic there is the report.
#![allow(clippy::unwrap_used)]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use common::*;
use smddp_core::Region;
use smddp_core::dtype::{DType, ReduceOp};
use smddp_core::plan::{Span, Who};
use smddp_core::transport::{Ctx, Message, MsgKey, NodeLocal};

std::thread_local! {
    static TAKEN: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        TAKEN.set(TAKEN.get() + 1);
        // SAFETY: passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn nothing_is_allocated_once_warm() {
    let all = |len| one_phase(vec![span_move(Who::All, Who::All, Span::input(0, len), Span::output(0, len))]);
    let plans = [all(4), all(4096), all(50_000)];
    let taken = on_ranks(2, SMALL, |me, mut node| {
        let mut memory = Memory { input: vec![1; 50_000], output: vec![0; 50_000], scratch: vec![] };
        let (buffers, sum) = (memory.buffers(), arith(DType::F32, ReduceOp::Sum, 2));
        let (mut out, mut back) = (vec![1; 9000], vec![0; 9000]);
        let bell = node.bell();
        let mut done = Vec::with_capacity(16);
        let mut before = 0;
        for round in 0..200u64 {
            if round == 100 {
                before = TAKEN.get();
            }
            for (ctx, plan) in plans.iter().enumerate() {
                node.submit(run(plan, buffers, sum, call(1), ctx as u64)).unwrap();
            }
            let peer = 1 - me as u32;
            let message = |from: usize, bytes: &mut Vec<u8>| Message {
                key: MsgKey { group: 1, seq: round, tag: from as u64 },
                peer,
                peer_rank: 10 + peer,
                // SAFETY: the bytes outlive the round.
                region: unsafe { Region::of(bytes) },
                call: call(1),
                ctx: Ctx(9),
            };
            node.recv(message(1 - me, &mut back)).unwrap();
            node.send(message(me, &mut out)).unwrap();
            while done.len() < 5 {
                if !node.poll(&mut done).unwrap() {
                    node.arm();
                    let value = bell.value();
                    if !node.poll(&mut done).unwrap() {
                        bell.wait(value, SLEEP);
                    }
                    node.disarm();
                }
            }
            done.clear();
        }
        TAKEN.get() - before
    });
    assert_eq!(taken, [0, 0]);
}
