//! What can go wrong while ranks find each other.

use std::time::Duration;

use smddp_core::error::Site;

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// An environment variable holds something impossible, or is missing while its sisters are there.
    #[error("environment variable {name}: expected {expected}, given {given}. {hint}")]
    Variable { name: String, expected: String, given: String, hint: String },

    /// No way to find the other ranks is left.
    #[error("{what}. {hint}")]
    NoWay { what: String, hint: String },

    /// MPI said no.
    #[error("MPI: {reason}. {hint}")]
    Mpi { reason: String, hint: String },

    /// Nobody answered as rank 0's store.
    #[error(
        "rank {rank} could not reach rank 0's store at {addresses} within {:.1} s: {reason}. Check that rank 0 has started, \
         that MASTER_ADDR names its host, and that no firewall closes these ports",
        waited.as_secs_f64()
    )]
    Unreachable { rank: usize, addresses: String, waited: Duration, reason: String },

    /// Rank 0 could open none of the ports its peers will try.
    #[error("rank 0 cannot listen on {addresses}: {reason}. Choose another MASTER_PORT")]
    Listen { addresses: String, reason: String },

    /// This process may not have enough connections.
    #[error(
        "rank 0 serves {size} ranks and needs {needed} open files, but may have {limit} at most. Raise its hard limit \
         (ulimit -Hn, LimitNOFILE, docker run --ulimit nofile)"
    )]
    Descriptors { size: usize, needed: u64, limit: u64 },

    /// The ranks contradict each other about the job.
    #[error(
        "the ranks disagree about the job: {what}. Every rank must be started for the same job, each with its own rank"
    )]
    Disagree { what: String },

    /// Ranks did not come in time.
    #[error("{scope}: waited {:.1} s for {}; they have not come. Check that they were started and are alive",
        waited.as_secs_f64(), ranks(missing))]
    Missing { scope: String, waited: Duration, missing: Vec<usize> },

    /// Two processes claim to be one rank.
    #[error(
        "{scope}: rank {rank} was published twice: two processes have the same rank, or a dead attempt left it. \
         Check how RANK is set"
    )]
    DuplicateRank { scope: String, rank: usize },

    /// The link to the store broke.
    #[error(
        "the store of rank 0 ({address}) is lost while rank {rank} did '{op}': {reason}. Look at rank 0's own output"
    )]
    Lost { rank: usize, address: String, op: String, reason: String },

    /// More than the store takes.
    #[error(
        "the store refused '{key}': {reason}. Only this job's ranks may use it, for short keys and small values"
    )]
    Refused { key: String, reason: String },

    /// A wait on one key ended without a value.
    #[error("no value for '{key}' within {:.1} s. Look at what the rank that sets it does, or raise the timeout",
        waited.as_secs_f64())]
    Timeout { key: String, waited: Duration },

    /// A store that is not ours (torch's) failed, or gave what no rank of this job wrote.
    #[error("{0}")]
    Store(smddp_core::Error),
}

fn ranks(missing: &[usize]) -> String {
    const SHOWN: usize = 16;
    let list: Vec<String> = missing.iter().take(SHOWN).map(ToString::to_string).collect();
    let more = missing.len().saturating_sub(SHOWN);
    let tail = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("rank{} {}{tail}", if missing.len() == 1 { "" } else { "s" }, list.join(", "))
}

impl Error {
    pub(crate) fn variable(
        name: &str,
        expected: impl Into<String>,
        given: impl Into<String>,
        hint: &str,
    ) -> Error {
        Error::Variable {
            name: name.to_owned(),
            expected: expected.into(),
            given: given.into(),
            hint: hint.to_owned(),
        }
    }
}

impl From<smddp_core::Error> for Error {
    fn from(error: smddp_core::Error) -> Error {
        Error::Store(error)
    }
}

impl From<Error> for smddp_core::Error {
    fn from(error: Error) -> smddp_core::Error {
        let site = |scope: &str| Site { group: scope.to_owned(), ..Site::unknown() };
        match error {
            Error::Variable { name, expected, given, hint } => {
                smddp_core::Error::Setting { name, given, expected: format!("expected {expected}"), hint }
            }
            Error::Missing { scope, waited, missing } => {
                smddp_core::Error::Timeout { site: site(&scope), waited, missing }
            }
            Error::Timeout { key, waited } => {
                smddp_core::Error::Timeout { site: site(&key), waited, missing: Vec::new() }
            }
            Error::NoWay { what, hint } => smddp_core::Error::Bootstrap { what, hint },
            Error::Mpi { reason, hint } => smddp_core::Error::Library { library: "MPI", reason, hint },
            Error::Store(error) => error,
            error @ (Error::Unreachable { .. }
            | Error::Listen { .. }
            | Error::Descriptors { .. }
            | Error::Disagree { .. }
            | Error::DuplicateRank { .. }
            | Error::Lost { .. }
            | Error::Refused { .. }) => split_hint(&error),
        }
    }
}

/// Core's error keeps the advice apart; ours ends with it.
fn split_hint(error: &Error) -> smddp_core::Error {
    let text = error.to_string();
    let (what, hint) = text.rsplit_once(". ").unwrap_or((&text, ""));
    smddp_core::Error::Bootstrap { what: what.to_owned(), hint: hint.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn core_keeps_the_advice_and_the_missing_ranks() {
        let listen = Error::Listen { addresses: "h:1".to_owned(), reason: "in use".to_owned() };
        match smddp_core::Error::from(listen) {
            smddp_core::Error::Bootstrap { hint, .. } => assert_eq!(hint, "Choose another MASTER_PORT"),
            other => panic!("{other}"),
        }
        let missing = Error::Missing { scope: "g".to_owned(), waited: Duration::ZERO, missing: vec![3] };
        match smddp_core::Error::from(missing) {
            smddp_core::Error::Timeout { missing, site, .. } => {
                assert_eq!((missing, site.group.as_str()), (vec![3], "g"));
            }
            other => panic!("{other}"),
        }
    }
}
