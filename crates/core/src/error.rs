//! The one error type of core; every transport's own error ends in one of these.

use std::time::Duration;

use crate::call::PackedCall;
use crate::dtype::{DType, ReduceOp};

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Where an error happened: this rank, in which group, in which operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// Rank within the group.
    pub rank: usize,
    /// The group's name, as the user knows it.
    pub group: String,
    /// The operation, as [`crate::Call`] prints it; empty while the group is being made.
    pub op: String,
    /// The operation's number in its group, from 0.
    pub seq: u64,
}

impl std::fmt::Display for Site {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rank {} of group '{}'", self.rank, self.group)?;
        if !self.op.is_empty() {
            write!(f, ", operation {} #{}", self.op, self.seq)?;
        }
        Ok(())
    }
}

/// What went wrong. After those that have a [`Site`], and after `Transport`, the group is of no more use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A call was given something it cannot work with.
    #[error("{op}: argument '{argument}': expected {expected}, given {given}. {hint}")]
    Argument { op: String, argument: &'static str, expected: String, given: String, hint: String },

    /// The reduction is not defined for the type.
    #[error(
        "{op}: reduction '{reduce}' is not defined for dtype {dtype}. Use a dtype it is defined for, or another reduction"
    )]
    Unsupported { op: String, reduce: ReduceOp, dtype: DType },

    /// Ranks made different calls.
    #[error(
        "{site}: ranks disagree: rank {rank} called {ours}, rank {peer} called {theirs}. Every rank must make the same calls in the same order",
        rank = site.rank
    )]
    Mismatch { site: Site, ours: String, peer: usize, theirs: String },

    /// The ranks `missing` did not come in time.
    #[error("{site}: timeout after {:.1} s, waiting for {}. Look at what those ranks do, or raise the timeout",
        waited.as_secs_f64(), ranks(missing))]
    Timeout { site: Site, waited: Duration, missing: Vec<usize> },

    /// Rank `peer`, which the call needs, is gone.
    #[error("{site}: lost rank {peer} on node {node}: {reason}. Look at that rank's own output")]
    PeerLost { site: Site, peer: usize, node: String, reason: String },

    /// The group was aborted or shut down, another rank failed, or the group had failed before.
    #[error("{site}: aborted: {}", with_advice(reason))]
    Aborted { site: Site, reason: String },

    /// An `SMDDP_…` variable is unknown, has an impossible value, or differs between ranks.
    #[error("setting {name}={given}: {expected}. {hint}")]
    Setting { name: String, given: String, expected: String, hint: String },

    /// The ranks did not find each other, or cannot work together.
    #[error("joining the job: {what}. {hint}")]
    Bootstrap { what: String, hint: String },

    /// MPI, libfabric, CUDA's driver or NCCL is missing or unusable.
    #[error("{library} could not be used: {reason}. {hint}")]
    Library { library: &'static str, reason: String, hint: String },

    /// The machine has too little of something.
    #[error("{what}: not enough {resource}: {reason}. {hint}")]
    Resource { what: String, resource: &'static str, reason: String, hint: String },

    /// Shared memory, the network, CUDA or NCCL failed in a way that has no better name.
    #[error("{transport}: {reason}")]
    Transport { transport: &'static str, reason: String },

    /// A mistake in this library.
    #[error("internal error, please report it: {0}")]
    Internal(String),
}

fn ranks(missing: &[usize]) -> String {
    match missing {
        [] => "completions on this rank".to_owned(),
        [one] => format!("rank {one}"),
        many => {
            let list: Vec<String> = many.iter().map(ToString::to_string).collect();
            format!("ranks {}", list.join(", "))
        }
    }
}

/// Peers quote each other's words, advice and all: once is enough.
fn with_advice(reason: &str) -> String {
    const ADVICE: &str = ". To go on, make a new group";
    format!("{reason}{}", if reason.ends_with(ADVICE) { "" } else { ADVICE })
}

impl Error {
    /// The same error with its site completed: transports know the peer and perhaps the operation, the engine knows the group.
    pub fn at(mut self, place: &Site) -> Error {
        match &mut self {
            Error::Mismatch { site, .. }
            | Error::Timeout { site, .. }
            | Error::PeerLost { site, .. }
            | Error::Aborted { site, .. } => {
                if site.group.is_empty() {
                    let op = std::mem::take(&mut site.op);
                    let known = if op.is_empty() {
                        place.clone()
                    } else {
                        Site { op, seq: site.seq, ..place.clone() }
                    };
                    *site = known;
                }
            }
            Error::Argument { .. }
            | Error::Unsupported { .. }
            | Error::Setting { .. }
            | Error::Bootstrap { .. }
            | Error::Library { .. }
            | Error::Resource { .. }
            | Error::Transport { .. }
            | Error::Internal(_) => {}
        }
        self
    }

    /// What a forked child gets of a group that its parent made.
    pub(crate) fn forked(site: Site) -> Error {
        let reason = "the process was forked after the group was made; make it in the child".to_owned();
        Error::Aborted { site, reason }
    }

    /// Where it happened, of errors that happen in an operation.
    pub fn site(&self) -> Option<&Site> {
        match self {
            Error::Mismatch { site, .. }
            | Error::Timeout { site, .. }
            | Error::PeerLost { site, .. }
            | Error::Aborted { site, .. } => Some(site),
            Error::Argument { .. }
            | Error::Unsupported { .. }
            | Error::Setting { .. }
            | Error::Bootstrap { .. }
            | Error::Library { .. }
            | Error::Resource { .. }
            | Error::Transport { .. }
            | Error::Internal(_) => None,
        }
    }
}

impl Site {
    /// A site to be completed by the engine (see [`Error::at`]).
    pub fn unknown() -> Site {
        Site { rank: 0, group: String::new(), op: String::new(), seq: 0 }
    }

    /// As [`unknown`](Self::unknown), where the transport knows the call and its number.
    pub fn of_call(call: PackedCall, seq: u64) -> Site {
        Site { op: call.to_string(), seq, ..Site::unknown() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_abort_that_is_passed_on_gives_its_advice_once() {
        let aborted = |reason: String| Error::Aborted { site: Site::unknown(), reason }.to_string();
        let first = aborted("abort() was called".to_owned());
        assert!(first.ends_with("abort() was called. To go on, make a new group"), "{first}");
        assert_eq!(aborted(format!("rank 1: {first}")).matches("make a new group").count(), 1);
    }
}
