//! What can go wrong while a group's shared memory is made.

use std::time::Duration;

use smddp_core::error::Site;

/// It becomes a [`smddp_core::Error`], which says what to do next where anybody can do something.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShmError {
    /// The kernel has no memory left for the group, or a limit forbids it.
    #[error("{reason}")]
    Memory { wanted: usize, reason: String },
    /// A rank of the node did not come in time. Group ranks.
    #[error("rank(s) {missing:?} did not come within {:.1} s", waited.as_secs_f64())]
    Late { waited: Duration, missing: Vec<usize> },
    /// A rank of the node went away while the memory was handed over. Group rank.
    #[error("rank {peer} on {node} is gone: {reason}")]
    Gone { peer: usize, node: String, reason: String },
    /// The rank that hands the memory out refused this one, or what it handed out is unusable.
    #[error("{0}")]
    Refused(String),
    /// A call to the system failed.
    #[error("{what}: {cause}")]
    System { what: &'static str, cause: String },
    /// The caller's parameters contradict each other.
    #[error("{0}")]
    Parameters(String),
}

impl ShmError {
    pub(crate) fn system(what: &'static str, cause: impl std::fmt::Display) -> ShmError {
        ShmError::System { what, cause: cause.to_string() }
    }
}

impl From<ShmError> for smddp_core::Error {
    fn from(error: ShmError) -> smddp_core::Error {
        use smddp_core::Error;
        match error {
            ShmError::Memory { wanted, ref reason } => Error::Resource {
                what: format!("sharing {wanted} bytes ({:.1} MiB) between this node's ranks", wanted as f64 / 1048576.0),
                resource: "shared memory",
                reason: reason.clone(),
                hint: "Lower SMDDP_SHM_SLOT or SMDDP_SHM_SLOTS, or raise the memory or file-size limit of the job"
                    .to_owned(),
            },
            ShmError::Late { waited, missing } => Error::Timeout { site: Site::unknown(), waited, missing },
            ShmError::Gone { peer, node, reason } => {
                Error::PeerLost { site: Site::unknown(), peer, node, reason }
            }
            ShmError::Refused(reason) => Error::Bootstrap {
                what: format!("sharing memory on this node: {reason}"),
                hint: "Start all ranks of the job from one launcher with one version of this library, and give ranks that cannot share memory different SMDDP_NODE_ID values".to_owned(),
            },
            ShmError::System { .. } => Error::Transport { transport: "shared memory", reason: error.to_string() },
            ShmError::Parameters(reason) => Error::Internal(format!("shared memory: {reason}")),
        }
    }
}
