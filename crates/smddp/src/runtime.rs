//! What a process has once, whatever the number of its groups: the engine with its progress thread and fabric.

use std::sync::{Arc, Mutex, Once, Weak};

use smddp_core::engine::Engine;
use smddp_core::settings::Settings;
use smddp_core::transport::Transports;
use smddp_core::{Error, Result};
use smddp_fabric::FabricEndpoint;
use smddp_shm::ShmNode;

/// Host memory: shared memory in a node, libfabric between nodes.
pub struct HostTransports;

impl Transports for HostTransports {
    type Local = ShmNode;
    type Fabric = FabricEndpoint;
}

/// Ends with the last group; a later group starts a new one.
static ENGINE: Mutex<Weak<Engine<HostTransports>>> = Mutex::new(Weak::new());

/// The process's engine, started now if there is none (or if the one there belongs to the process we were forked from).
pub fn engine(settings: &Settings) -> Result<Arc<Engine<HostTransports>>> {
    let mut place =
        ENGINE.lock().map_err(|_| Error::Internal("starting the engine panicked before".to_owned()))?;
    if let Some(engine) = place.upgrade().filter(|e| e.is_ours()) {
        return Ok(engine);
    }
    start_log(settings);
    smddp_core::reduce::use_portable(settings.text("SMDDP_SIMD") == "portable");
    let engine = Arc::new(Engine::new(settings)?);
    *place = Arc::downgrade(&engine);
    Ok(engine)
}

/// Logs go to standard error, filtered by SMDDP_LOG, unless the program has its own subscriber.
fn start_log(settings: &Settings) {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        let filter = tracing_subscriber::EnvFilter::try_new(settings.text("SMDDP_LOG"));
        let subscriber = tracing_subscriber::fmt()
            .with_writer(std::io::stderr)
            .with_env_filter(filter.unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn")));
        // A program that has set up its own subscriber keeps it.
        let _ = subscriber.try_init();
    });
}
