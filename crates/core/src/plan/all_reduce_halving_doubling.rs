//! All-reduce by recursive halving, then doubling (Rabenseifner): 2 log2(N) steps and, for a power of two, the fewest
//! bytes, 2(N-1)/N of the data each way. Other N fold as in recursive doubling, which costs up to one more.

use super::build::{Builder, LINE, cut};
use super::data::Span;
use super::rail::{Fold, Rail, Role};

pub(super) fn build(b: &mut Builder, rail: &Rail, data: Span, out: Span, elem: usize) {
    let fold = Fold::new(rail.len());
    let (v, extra) = match fold.role(rail.me) {
        Role::Folded { into } => {
            b.send(rail.ranks[into], data);
            b.recv(rail.ranks[into], out);
            return;
        }
        Role::Core { v, extra } => (v, extra),
    };
    let mut sum = data;
    if let Some(extra) = extra {
        let slot = b.reserve(data.len);
        b.recv(rail.ranks[extra], slot);
        b.reduce(slot, vec![data, slot], false);
        sum = slot;
    }
    // `sum` holds the bytes of parts `first..first + 2^(k+1)`.
    for k in (0..fold.steps).rev() {
        let (peer_v, half) = (v ^ (1 << k), 1 << k);
        let peer = rail.ranks[fold.real(peer_v)];
        let first = v >> (k + 1) << (k + 1);
        let base = range(data.len, fold.core(), first, 0, elem).0;
        let keep = range(data.len, fold.core(), first + (v & half), half, elem);
        let give = range(data.len, fold.core(), first + (peer_v & half), half, elem);
        let kept = sum.part((keep.0 - base, keep.1));
        let slot = b.reserve(keep.1);
        b.recv(peer, slot);
        b.send(peer, sum.part((give.0 - base, give.1)));
        let last = k == 0;
        let srcs = if v < peer_v { vec![kept, slot] } else { vec![slot, kept] };
        sum = if last { out.part(keep) } else { slot };
        b.reduce(sum, srcs, last);
    }
    for k in 0..fold.steps {
        let (peer_v, size) = (v ^ (1 << k), 1 << k);
        let peer = rail.ranks[fold.real(peer_v)];
        let have = |v: usize| out.part(range(data.len, fold.core(), v >> k << k, size, elem));
        b.recv(peer, have(peer_v));
        b.send(peer, have(v));
    }
    if let Some(extra) = extra {
        b.send(rail.ranks[extra], out);
    }
}

/// Offset and length of parts `first..first + count`.
fn range(len: usize, parts: usize, first: usize, count: usize, elem: usize) -> (usize, usize) {
    let start = |i: usize| if i == parts { len } else { cut(len, parts, i, elem).0 };
    (start(first), start(first + count) - start(first))
}

pub(super) fn link(nodes: usize, me: usize, len: usize, elem: usize) -> usize {
    let fold = Fold::new(nodes);
    let core = fold.core();
    match fold.role(me) {
        Role::Folded { .. } => len,
        Role::Core { v, extra } => {
            // What halving sends, doubling receives, and the other way round.
            let share = |v: usize, k: usize| range(len, core, v >> k << k, 1 << k, elem).1;
            let both: usize = (0..fold.steps).map(|k| share(v, k) + share(v ^ (1 << k), k)).sum();
            both + if extra.is_some() { len } else { 0 }
        }
    }
}

pub(super) fn scratch(nodes: usize, len: usize, _elem: usize) -> usize {
    2 * len.next_multiple_of(LINE) + 2 * LINE * (Fold::new(nodes).steps + 1)
}
