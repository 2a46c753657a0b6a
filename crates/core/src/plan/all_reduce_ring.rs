//! All-reduce around a ring: N-1 steps that sum, N-1 that pass the results on (Patarasu and Yuan, 2009).
//!
//! Fewest bytes over each link, 2(N-1)/N of the data each way, and only neighbours talk; 2(N-1) steps.

use super::build::{Builder, LINE, cut, longest_cut};
use super::data::Span;
use super::rail::Rail;

pub(super) fn build(b: &mut Builder, rail: &Rail, data: Span, out: Span, elem: usize) {
    let (n, me) = (rail.len(), rail.me);
    let (left, right) = (rail.ranks[(me + n - 1) % n], rail.ranks[(me + 1) % n]);
    // In step s the sum of part (me - s) goes right; what comes from the left lacks only this rank's share.
    let part = |s: usize| (me + 2 * n - s) % n;
    let mut sum = data.cut(n, part(0), elem);
    for s in 1..n {
        let own = data.cut(n, part(s), elem);
        let slot = b.reserve(own.len);
        b.recv(left, slot);
        b.send(right, sum);
        let last = s == n - 1;
        sum = if last { out.cut(n, part(s), elem) } else { slot };
        b.reduce(sum, vec![slot, own], last);
    }
    for s in 0..n - 1 {
        b.send(right, out.cut(n, part(s + n - 1), elem));
        b.recv(left, out.cut(n, part(s), elem));
    }
}

pub(super) fn link(nodes: usize, _me: usize, len: usize, elem: usize) -> usize {
    let shortest = (0..nodes).map(|i| cut(len, nodes, i, elem).1).min().unwrap_or(0);
    2 * (len - shortest)
}

pub(super) fn scratch(nodes: usize, len: usize, elem: usize) -> usize {
    (nodes - 1) * longest_cut(len, nodes, elem).next_multiple_of(LINE)
}
