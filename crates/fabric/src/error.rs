//! What can go wrong while opening the fabric; while it runs, errors are core's own.

use smddp_core::Error as CoreError;
use smddp_libfabric_sys::LoadError;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Library(#[from] LoadError),

    /// No interface fits the settings.
    #[error("no network interface for provider '{provider}' fits {wanted}; it offers {offered}. {hint}")]
    NoNic { provider: String, wanted: String, offered: String, hint: &'static str },

    /// A libfabric call failed.
    #[error("{call} on {nic}: {text} ({code})")]
    Call { call: &'static str, nic: String, code: isize, text: String },

    /// Memory for slots could not be had.
    #[error("{bytes} bytes for the fabric's message slots: {reason}")]
    Memory { bytes: usize, reason: String },

    /// The kernel gave no random bytes for the endpoint's identity.
    #[error("the system gave no random bytes (getrandom)")]
    Random,

    /// The other process's address does not fit this one.
    #[error("address of {label}: {reason}")]
    Address { label: String, reason: String },
}

impl From<Error> for CoreError {
    fn from(error: Error) -> CoreError {
        match &error {
            Error::Library(_) => CoreError::Library {
                library: "libfabric",
                reason: error.to_string(),
                hint: "It is needed between nodes only".to_owned(),
            },
            Error::NoNic { .. } => CoreError::Library {
                library: "libfabric",
                reason: error.to_string(),
                hint: "`smddp-perf info` lists what was found".to_owned(),
            },
            Error::Call { .. } | Error::Address { .. } | Error::Random => {
                CoreError::Transport { transport: "fabric", reason: error.to_string() }
            }
            Error::Memory { bytes, reason } => CoreError::Resource {
                what: "the fabric's message slots".to_owned(),
                resource: "memory",
                reason: format!("{bytes} bytes: {reason}"),
                hint: "Lower SMDDP_EAGER or raise the limit on locked memory".to_owned(),
            },
        }
    }
}
