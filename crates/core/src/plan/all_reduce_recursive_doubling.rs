//! All-reduce by recursive doubling: log2(N) exchanges of everything; the fewest steps, for small data.
//!
//! Any N: of the first 2(N - 2^k) participants the odd ones fold into their left neighbour and get the result back
//! (Thakur, Rabenseifner and Gropp, 2005). The operand of the lower participant comes first on both sides, so both
//! hold the same bits.

use super::build::{Builder, LINE};
use super::data::Span;
use super::rail::{Fold, Rail, Role};

pub(super) fn build(b: &mut Builder, rail: &Rail, data: Span, out: Span, _elem: usize) {
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
    for k in 0..fold.steps {
        let peer_v = v ^ (1 << k);
        let peer = rail.ranks[fold.real(peer_v)];
        let slot = b.reserve(data.len);
        b.recv(peer, slot);
        b.send(peer, sum);
        let last = k + 1 == fold.steps;
        let srcs = if v < peer_v { vec![sum, slot] } else { vec![slot, sum] };
        sum = if last { out } else { slot };
        b.reduce(sum, srcs, last);
    }
    if let Some(extra) = extra {
        b.send(rail.ranks[extra], out);
    }
}

pub(super) fn link(nodes: usize, me: usize, len: usize, _elem: usize) -> usize {
    let fold = Fold::new(nodes);
    match fold.role(me) {
        Role::Folded { .. } => len,
        Role::Core { extra, .. } => (fold.steps + usize::from(extra.is_some())) * len,
    }
}

pub(super) fn scratch(nodes: usize, len: usize, _elem: usize) -> usize {
    (Fold::new(nodes).steps + 1) * len.next_multiple_of(LINE)
}
