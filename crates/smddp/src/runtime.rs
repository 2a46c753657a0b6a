//! What a process has once, whatever the number of its groups: the engine with its progress thread and fabric.

use std::sync::{Arc, Mutex, Once, Weak};

use smddp_core::engine::Engine;
use smddp_core::settings::Settings;
use smddp_core::{Error, Result};
use tracing_subscriber::EnvFilter;

use crate::transports::HostTransports;

/// Ends with the last group; a later group starts a new one.
static ENGINE: Mutex<Weak<Engine<HostTransports>>> = Mutex::new(Weak::new());

/// The process's engine, started now if there is none, or if the one there is of no use: it belongs to the process we were forked from,
/// or has died of a panic, and whoever keeps one of its groups or operations keeps it.
pub fn engine(settings: &Settings) -> Result<Arc<Engine<HostTransports>>> {
    let mut place =
        ENGINE.lock().map_err(|_| Error::Internal("starting the engine panicked before".to_owned()))?;
    if let Some(engine) = place.upgrade().filter(|engine| engine.is_ours() && !engine.is_dead()) {
        return Ok(engine);
    }
    start_log(settings)?;
    smddp_core::reduce::use_portable(settings.text("SMDDP_SIMD") == "portable");
    let engine = Arc::new(Engine::new(settings)?);
    *place = Arc::downgrade(&engine);
    Ok(engine)
}

/// Logs go to standard error, filtered by SMDDP_LOG, unless the program has its own subscriber.
fn start_log(settings: &Settings) -> Result<()> {
    static STARTED: Once = Once::new();
    let given = settings.text("SMDDP_LOG");
    let filter = EnvFilter::try_new(given).map_err(|e| Error::Setting {
        name: "SMDDP_LOG".to_owned(),
        given: given.to_owned(),
        expected: format!("expected a log filter: {e}"),
        hint: "Write a level (error, warn, info, debug, trace), or target=level, separated by commas"
            .to_owned(),
    })?;
    STARTED.call_once(|| {
        let subscriber = tracing_subscriber::fmt().with_writer(std::io::stderr).with_env_filter(filter);
        // A program that has set up its own subscriber keeps it.
        let _ = subscriber.try_init();
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    /// Whoever still holds an operation of the engine that has died keeps nobody from a new group.
    #[test]
    fn after_a_panic_the_next_group_gets_a_new_engine() {
        let settings = Settings::default();
        let dead = engine(&settings).unwrap();
        assert!(Arc::ptr_eq(&dead, &engine(&settings).unwrap()));
        let open = || dead.with_fabric(|| panic!("as it happens"), |_| Ok(()));
        assert!(catch_unwind(AssertUnwindSafe(open)).is_err());
        dead.with_fabric_if_any(|_| Ok(())).unwrap_err();
        let next = engine(&settings).unwrap();
        next.with_fabric_if_any(|_| Ok(())).unwrap();
    }

    #[test]
    fn a_log_filter_that_makes_no_sense_is_refused() {
        let mut settings = Settings::default();
        settings.set("SMDDP_LOG", "smddp_core=loud").unwrap();
        let error = start_log(&settings).unwrap_err();
        assert!(matches!(&error, Error::Setting { name, .. } if name == "SMDDP_LOG"), "{error}");
        assert!(error.to_string().contains("smddp_core=loud"), "{error}");
    }
}
