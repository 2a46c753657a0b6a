//! What every algorithm builds with: balanced cuts, and a plan builder that finds the dependencies itself.
//!
//! - **B1** a step depends on every earlier step of the plan whose bytes it conflicts with, and on nothing else.
//! - **B2** the k-th message to a peer has tag k on both sides, so both sides list a pair's messages in one order.
//! - **B3** empty messages, reductions and moves are left out; both sides see the same lengths, so both leave them out.

use std::collections::{BTreeMap, HashMap};

use super::data::{Buf, Move, Op, Plan, Span, Step, StepId, Who};

/// Cuts below this size follow elements, larger ones cache lines.
const ALIGN_FROM: usize = 4096;
/// Where cuts and scratch are aligned to.
pub(super) const LINE: usize = 64;

/// Piece `i` of `len` bytes cut in `parts` pieces that differ by at most one element (one cache line when large).
pub(crate) fn cut(len: usize, parts: usize, i: usize, elem: usize) -> (usize, usize) {
    let unit = if len / parts >= ALIGN_FROM { LINE.max(elem) } else { elem };
    let units = len / unit;
    let start = |i: usize| if i == parts { len } else { (i * (units / parts) + i.min(units % parts)) * unit };
    (start(i), start(i + 1) - start(i))
}

/// The longest piece that [`cut`] gives: the first, or the last with the rest.
pub(super) fn longest_cut(len: usize, parts: usize, elem: usize) -> usize {
    cut(len, parts, 0, elem).1.max(cut(len, parts, parts - 1, elem).1)
}

impl Span {
    /// Bytes `off..off + len` of this span.
    pub(super) const fn part(self, (off, len): (usize, usize)) -> Span {
        Span { buf: self.buf, off: self.off + off, len }
    }
    /// Piece `i` of `parts`.
    pub(super) fn cut(self, parts: usize, i: usize, elem: usize) -> Span {
        self.part(cut(self.len, parts, i, elem))
    }
    pub(super) const fn is_empty(self) -> bool {
        self.len == 0
    }
}

/// Who last wrote some bytes, and who has read them since.
#[derive(Clone, Default)]
struct Segment {
    end: usize,
    writer: Option<StepId>,
    readers: Vec<StepId>,
}

/// The steps so far that matter to whoever touches a buffer next: disjoint segments by start.
#[derive(Default)]
struct Hazards(BTreeMap<usize, Segment>);

impl Hazards {
    /// Makes `at` a border between segments.
    fn split(&mut self, at: usize) {
        let Some((_, segment)) = self.0.range_mut(..at).next_back() else { return };
        if segment.end > at {
            let right = segment.clone();
            segment.end = at;
            self.0.insert(at, right);
        }
    }

    fn read(&mut self, span: Span, step: StepId, deps: &mut Vec<StepId>) {
        let (mut at, end) = (span.off, span.off + span.len);
        self.split(at);
        self.split(end);
        let mut gaps = Vec::new();
        for (&start, segment) in self.0.range_mut(at..end) {
            if start > at {
                gaps.push((at, start));
            }
            deps.extend(segment.writer);
            segment.readers.push(step);
            at = segment.end;
        }
        if at < end {
            gaps.push((at, end));
        }
        for (start, end) in gaps {
            self.0.insert(start, Segment { end, writer: None, readers: vec![step] });
        }
    }

    fn write(&mut self, span: Span, step: StepId, deps: &mut Vec<StepId>) {
        let (at, end) = (span.off, span.off + span.len);
        self.split(at);
        self.split(end);
        let starts: Vec<usize> = self.0.range(at..end).map(|(&s, _)| s).collect();
        for start in starts {
            let Some(segment) = self.0.remove(&start) else { continue };
            // Readers came after the writer and depend on it.
            if segment.readers.iter().all(|&r| r == step) {
                deps.extend(segment.writer);
            }
            deps.extend(segment.readers);
        }
        self.0.insert(at, Segment { end, writer: Some(step), readers: Vec::new() });
    }
}

/// Builds one rank's plan; see the module's invariants.
pub(super) struct Builder {
    plan: Plan,
    local: u32,
    hazards: [Hazards; 3],
    sent: HashMap<u32, u32>,
    received: HashMap<u32, u32>,
}

impl Builder {
    /// For the rank whose local rank is `local`.
    pub(super) fn new(local: usize) -> Builder {
        Builder {
            plan: Plan::default(),
            local: local as u32,
            hazards: Default::default(),
            sent: HashMap::new(),
            received: HashMap::new(),
        }
    }

    pub(super) fn finish(self) -> Plan {
        self.plan
    }

    pub(super) fn reserve(&mut self, len: usize) -> Span {
        self.plan.reserve(len)
    }

    pub(super) fn send(&mut self, to: u32, src: Span) {
        if !src.is_empty() {
            self.send_always(to, src);
        }
    }

    pub(super) fn recv(&mut self, from: u32, dst: Span) {
        if !dst.is_empty() {
            self.recv_always(from, dst);
        }
    }

    /// Sends even nothing: where only this side knows the length, the peer must hear of it.
    pub(super) fn send_always(&mut self, to: u32, src: Span) {
        let tag = next(&mut self.sent, to);
        self.push(Op::Send { to, src, tag }, &[src], &[]);
    }

    pub(super) fn recv_always(&mut self, from: u32, dst: Span) {
        let tag = next(&mut self.received, from);
        self.push(Op::Recv { from, dst, tag }, &[], &[dst]);
    }

    pub(super) fn reduce(&mut self, dst: Span, srcs: Vec<Span>, finish: bool) {
        if !dst.is_empty() {
            let reads = srcs.clone();
            self.push(Op::Reduce { dst, srcs, finish }, &reads, &[dst]);
        }
    }

    pub(super) fn copy(&mut self, dst: Span, src: Span) {
        if !dst.is_empty() && dst != src {
            self.push(Op::Copy { dst, src }, &[src], &[dst]);
        }
    }

    /// A phase of those of `moves` that move something.
    pub(super) fn phase(&mut self, mut moves: Vec<Move>) {
        moves.retain(|m| !m.src.is_empty());
        if moves.is_empty() {
            return;
        }
        let here = |who: Who| who == Who::All || who == Who::One(self.local);
        let reads: Vec<Span> = moves.iter().filter(|m| here(m.from)).map(|m| m.src).collect();
        let writes: Vec<Span> = moves.iter().filter(|m| here(m.to)).map(|m| m.dst).collect();
        self.push(Op::Phase(moves), &reads, &writes);
    }

    fn push(&mut self, op: Op, reads: &[Span], writes: &[Span]) {
        let step = self.plan.steps.len() as StepId;
        let mut after = Vec::new();
        for span in reads.iter().filter(|s| !s.is_empty()) {
            self.hazards[index(span.buf)].read(*span, step, &mut after);
        }
        for span in writes.iter().filter(|s| !s.is_empty()) {
            self.hazards[index(span.buf)].write(*span, step, &mut after);
        }
        after.sort_unstable();
        after.dedup();
        after.retain(|&s| s != step);
        self.plan.steps.push(Step { op, after });
    }
}

const fn index(buf: Buf) -> usize {
    match buf {
        Buf::Input => 0,
        Buf::Output => 1,
        Buf::Scratch => 2,
    }
}

fn next(tags: &mut HashMap<u32, u32>, peer: u32) -> u32 {
    let tag = tags.entry(peer).or_insert(0);
    *tag += 1;
    *tag - 1
}

/// `src` of every local rank combined at `dst` of local rank `to`.
pub(super) fn gather_sum(to: usize, src: Span, dst: Span, finish: bool) -> Move {
    Move { from: Who::All, to: Who::One(to as u32), src, dst, finish }
}

/// `src` of local rank `from` to `dst` of every local rank.
pub(super) fn spread(from: usize, src: Span, dst: Span) -> Move {
    Move { from: Who::One(from as u32), to: Who::All, src, dst, finish: false }
}

/// `src` of local rank `from` to `dst` of local rank `to`.
pub(super) fn pass(from: usize, to: usize, src: Span, dst: Span) -> Move {
    Move { from: Who::One(from as u32), to: Who::One(to as u32), src, dst, finish: false }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_cover_and_are_balanced() {
        let beyond_32_bits =
            [((1 << 32) + 6, 5, 2), ((5 << 30) + 3, 7, 1), (1 << 33, 64, 8), ((1 << 40) + 4, 3, 4)];
        let small = [(0, 3, 4), (40, 3, 4), (1 << 20, 7, 2), (65_536 + 6, 5, 2), (7, 9, 1)];
        for (len, parts, elem) in small.into_iter().chain(beyond_32_bits) {
            let pieces: Vec<_> = (0..parts).map(|i| cut(len, parts, i, elem)).collect();
            let mut at = 0;
            for &(off, n) in &pieces {
                assert_eq!(off, at);
                assert_eq!(n % elem, 0);
                at += n;
            }
            assert_eq!(at, len);
            let (lo, hi) =
                (pieces.iter().map(|p| p.1).min().unwrap(), pieces.iter().map(|p| p.1).max().unwrap());
            assert_eq!(hi, longest_cut(len, parts, elem));
            assert!(hi - lo <= if len / parts >= ALIGN_FROM { LINE } else { elem }, "{pieces:?}");
        }
    }

    #[test]
    fn dependencies_follow_the_bytes() {
        let mut b = Builder::new(0);
        let s = b.reserve(64);
        b.recv(1, s.part((0, 32))); // 0
        b.recv(2, s.part((32, 32))); // 1
        b.send(1, s.part((16, 32))); // 2 reads both
        b.copy(s.part((0, 16)), Span::output(0, 16)); // 3 overwrites 0, not read by 2
        b.copy(s.part((40, 8)), Span::output(0, 8)); // 4 overwrites what 2 reads
        let after: Vec<_> = b.finish().steps.into_iter().map(|s| s.after).collect();
        assert_eq!(after, [vec![], vec![], vec![0, 1], vec![0], vec![2]]);
    }
}
