//! Who is in the job, and how its ranks exchange bytes.
//!
//! [`join`] is for programs that bring no store of their own: it finds rank and size and gives a
//! [`Store`](smddp_core::store::Store) all ranks share. [`launcher_env`] is for PyTorch programs under a bare mpirun: it gives the variables
//! torch's own rendezvous wants. [`exchange`] works on any store, torch's included.
//!
//! How [`join`] finds the others, unless SMDDP_BOOTSTRAP names one way:
//!
//! 1. *mpi*: started by mpirun (or srun with PMIx), MPI found: one exchange through MPI tells all ranks the address
//!    of rank 0's [`tcp_store::TcpStore`] and a random secret.
//! 2. *env*: rank and size from variables, the store at MASTER_ADDR. Torch's own store has MASTER_PORT; ours takes the
//!    first free one of the ports [`STORE_PORT_STEP`], 2×, 3× and 4× as far above it (modulo the port range). The
//!    secret is derived from MASTER_PORT, torchrun's run id, and the launcher's job id where the port comes from that:
//!    it keeps jobs apart, not attackers out.
//! 3. *single*: neither launcher nor variables: a job of one.

#![forbid(unsafe_code)]

mod descriptors;
mod dial;
pub mod env;
pub mod error;
pub mod exchange;
mod host;
mod job;
mod kv;
mod launcher;
mod lookup;
mod master;
pub mod mpi;
mod server;
pub mod single;
mod slurm;
pub mod tcp_store;
mod wire;

pub use env::{Env, Launcher, Vars};
pub use error::{Error, Result};
pub use job::{Job, STORE_PORT_STEP, join, join_with};
pub use launcher::launcher_env;
