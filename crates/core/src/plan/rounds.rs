//! How a call is cut in rounds: large enough to be efficient, small enough for the staging memory.
//!
//! - **R1** every rank of the group decides alike: nothing here depends on the rank.
//! - **R2** scratch of all rounds in flight stays within [`Tuning::scratch`], whatever the message's size.

use std::sync::Arc;

use super::build::LINE;
use super::context::Context;
use super::data::{Plan, Schedule};
use super::tuning::Tuning;
use crate::error::{Error, Result};

const KIB: usize = 1024;
/// What one message between nodes should carry at least, where there is enough to carry.
pub(super) const LEAST_MESSAGE: usize = 64 * KIB;
/// And at most: more gains nothing, and leaves less to overlap.
pub(super) const MOST_MESSAGE: usize = 256 * KIB;
/// Rounds that a call is cut in where messages stay large enough, so that its stages overlap.
const OVERLAP: usize = 4;
/// (window, lag), the preferred first: with a lag one less than fits, a round's last phase need not wait for the
/// first phase of the round that takes its place.
const WINDOWS: [(usize, usize); 3] = [(4, 2), (3, 1), (2, 1)];

/// What is to be cut and how.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cutting {
    /// Bytes that all rounds cover together.
    pub(super) total: usize,
    pub(super) elem: usize,
    /// Bytes of one round, if scratch allows it.
    pub(super) wanted: usize,
    /// Fewer rounds in flight come before rounds smaller than this.
    pub(super) least: usize,
}

impl Cutting {
    /// For `total` bytes that go between nodes in `parts` messages a round.
    pub(super) fn between_nodes(cx: &Context<'_>, total: usize, parts: usize) -> Cutting {
        let least = parts * LEAST_MESSAGE;
        let wanted = (total / OVERLAP).clamp(least, parts * MOST_MESSAGE);
        Cutting { total, elem: cx.call.elem, wanted, least }
    }

    /// In one round, unless a person has set the rounds' size.
    pub(super) fn whole(cx: &Context<'_>, total: usize) -> Cutting {
        Cutting { total, elem: cx.call.elem, wanted: total, least: total }
    }

    /// Chooses the rounds, where one round of `len` bytes needs `scratch(len)`.
    pub(super) fn rounds(mut self, tuning: &Tuning, scratch: impl Fn(usize) -> usize) -> Result<Rounds> {
        let need = |len: usize| scratch(len).next_multiple_of(LINE);
        if tuning.chunk > 0 {
            self.wanted = tuning.chunk;
            self.least = tuning.chunk;
        }
        let budget = tuning.scratch();
        if self.total <= self.wanted && need(self.total) <= budget {
            return Ok(Rounds { bytes: self.total, full: 1, tail: 0, window: 1, lag: 1 });
        }
        let fits = |window: usize| self.fit(budget / window, &need);
        let mut window = (1, 1);
        for choice in WINDOWS {
            window = choice;
            if fits(choice.0) >= self.least.min(self.wanted) {
                break;
            }
        }
        let (window, lag) = window;
        let mut bytes = fits(window);
        if bytes == 0 {
            return Err(self.too_little(budget, window * need(self.elem)));
        }
        if tuning.chunk == 0 {
            let rounds = self.total.div_ceil(bytes);
            bytes = self.total.div_ceil(rounds).next_multiple_of(self.grain(bytes)).min(bytes);
        }
        let (full, tail) = (self.total / bytes, self.total % bytes);
        Ok(Rounds { bytes, full, tail, window, lag })
    }

    /// The largest round, up to the wanted one, that needs no more than `budget`; 0 if none.
    fn fit(&self, budget: usize, need: &impl Fn(usize) -> usize) -> usize {
        let down = |len: usize| len / self.grain(len) * self.grain(len);
        let mut len = down(self.wanted.max(self.elem).min(self.total));
        while len > 0 && need(len) > budget {
            let share = (len as u128 * budget as u128 / need(len) as u128) as usize;
            len = down(share.min(len - self.elem));
        }
        len
    }

    /// Rounds are whole elements, large ones whole cache lines.
    fn grain(&self, len: usize) -> usize {
        if len >= LINE * LINE { LINE.max(self.elem) } else { self.elem }
    }

    fn too_little(&self, budget: usize, needed: usize) -> Error {
        Error::Resource {
            what: "planning a collective".to_owned(),
            resource: "staging memory",
            reason: format!("the smallest round needs {needed} bytes, a call may use {budget}"),
            hint: format!("Raise SMDDP_STAGING to at least {}", needed * Tuning::SHARES),
        }
    }
}

/// How a call is cut; the same on every rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rounds {
    pub(super) bytes: usize,
    pub(super) full: usize,
    pub(super) tail: usize,
    pub(super) window: usize,
    pub(super) lag: usize,
}

impl Rounds {
    /// The schedule of rounds that `make` builds from their lengths; `link` bounds the whole call's bytes.
    pub(super) fn schedule(&self, name: &'static str, link: usize, make: impl Fn(usize) -> Plan) -> Schedule {
        let tail = (self.tail > 0).then(|| Arc::new(make(self.tail)));
        Schedule {
            algorithm: name,
            body: Arc::new(make(self.bytes)),
            full_rounds: self.full,
            tail,
            round_bytes: self.bytes,
            window: self.window,
            lag: self.lag,
            link_bytes: link,
        }
    }

    pub(super) fn count(&self) -> usize {
        self.full + usize::from(self.tail > 0)
    }

    /// The sum of `of` over the rounds' lengths.
    pub(super) fn sum(&self, of: impl Fn(usize) -> usize) -> usize {
        self.full * of(self.bytes) + if self.tail > 0 { of(self.tail) } else { 0 }
    }
}
