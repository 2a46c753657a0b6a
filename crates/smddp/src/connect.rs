//! Makes a process group: who is who, which ranks share a node, how each is reached.
//!
//! Three exchanges through the store: *hello* (identity, node, settings that must agree), *contact* (socket of the
//! node's segment, fabric address) and *ready*. A rank that fails says so in the next exchange, so that the others fail
//! at once with its reason instead of waiting for their time limit.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use smddp_bootstrap::exchange;
use smddp_core::engine::Engine;
use smddp_core::engine::execution::Route;
use smddp_core::engine::group::Seat;
use smddp_core::error::Site;
use smddp_core::plan::Tuning;
use smddp_core::process;
use smddp_core::settings::Settings;
use smddp_core::store::Store;
use smddp_core::threads;
use smddp_core::transport::Fabric;
use smddp_core::{Error, GroupShape, Result};
use smddp_fabric::{FabricEndpoint, Place};
use smddp_shm::{Geometry, Listener, Membership, ShmNode, SingleCopies};

use crate::contact::{self, Contact, Hello, Outcome, PROTOCOL};
use crate::dirs::library_dirs;
use crate::node::{self, NodeId, cores};
use crate::slots::Choice;
use crate::transports::{Communicator, HostTransports};
use crate::{caches, runtime, slots};

/// Shared memory of a rank that its first groups may take; they get slots of the size set, or found best. The first
/// one always does.
const FULL_RINGS: usize = 12 << 20;
/// Bytes of a slot in the groups after those.
const SMALL_SLOT: usize = 64 << 10;

/// Threads for large reductions that a rank of many cores takes unasked: the rest is the program's. More was not measured.
const MOST_THREADS: usize = 4;

/// How long a rank whose group cannot be made waits for the others to have read why.
const FAREWELL: Duration = Duration::from_secs(2);
/// Time limits beyond it are none; a clock counts no further than some centuries.
const LONGEST: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// What a new group needs.
pub struct GroupOptions {
    /// For people.
    pub name: String,
    /// Prefix of the group's keys in the store; unique to the group and, where a job restarts, to the attempt.
    pub scope: String,
    pub rank: usize,
    pub size: usize,
    pub store: Arc<dyn Store>,
    /// Limit for making the group, and for operations that give none of their own.
    pub timeout: Duration,
    pub settings: Settings,
    /// Folders in which libfabric may lie, beside the usual ones.
    pub library_dirs: Vec<PathBuf>,
}

/// What is known after the hello.
struct Party<'a> {
    options: &'a GroupOptions,
    deadline: Instant,
    hellos: Vec<Hello>,
    shape: Arc<GroupShape>,
    engine: Arc<Engine<HostTransports>>,
}

/// Makes a group; every member calls it.
pub fn connect(options: GroupOptions) -> Result<Communicator> {
    if options.rank >= options.size {
        return Err(Error::Argument {
            op: "making a process group".to_owned(),
            argument: "rank",
            expected: format!("0 to {}", options.size.saturating_sub(1)),
            given: options.rank.to_string(),
            hint: format!("Group '{}' has {} ranks", options.name, options.size),
        });
    }
    let tuning = Tuning::from_settings(&options.settings)?;
    let deadline = Instant::now() + options.timeout.min(LONGEST);
    let engine = runtime::engine(&options.settings)?;
    let hellos = hello(&options, deadline)?;
    let labels: Vec<&str> = hellos.iter().map(|h| h.node.as_str()).collect();
    let shape = Arc::new(GroupShape::from_labels(&labels));
    let party = Party { options: &options, deadline, hellos, shape, engine };
    let seat = party.join()?;
    let neighbours = party.neighbours();
    if node::are_crowded(&neighbours) {
        party.engine.set_crowded();
    }
    // A process's first group is its largest: others may not know all ranks of the machine.
    if party.engine.groups() == 0 {
        let given = party.options.settings.number_set("SMDDP_REDUCE_THREADS");
        let owned = || node::owned(&party.hellos[party.options.rank].cores, &neighbours);
        threads::use_threads(given.unwrap_or_else(|| owned().min(MOST_THREADS)));
    }
    let communicator = Communicator::new(Arc::clone(&party.engine), seat, tuning, options.timeout)?;
    tracing::info!(group = options.name, rank = options.rank, "{}", communicator.describe());
    Ok(communicator)
}

fn hello(options: &GroupOptions, deadline: Instant) -> Result<Vec<Hello>> {
    let node = NodeId::of_this_process(&options.settings);
    let (id, secret) = random()?;
    let mine = Hello {
        protocol: PROTOCOL,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        size: options.size,
        node: node.label,
        node_name: node.name,
        cores: cores(),
        settings: contact::shared_settings(&options.settings),
        id,
        secret,
    };
    let all = gather(options, "hello", &contact::to_bytes(&mine)?, deadline)?;
    let hellos = contact::from_bytes(&options.name, &all)?;
    contact::check(&options.name, options.rank, &hellos)?;
    Ok(hellos)
}

fn gather(options: &GroupOptions, round: &str, bytes: &[u8], deadline: Instant) -> Result<Vec<Vec<u8>>> {
    let scope = format!("{}/{round}", options.scope);
    let gathered = exchange::all_gather(&*options.store, &scope, options.rank, options.size, bytes, deadline);
    gathered.map_err(|error| match error.into() {
        Error::Timeout { waited, missing, .. } => {
            let site = Site { rank: options.rank, group: options.name.clone(), ..Site::unknown() };
            Error::Timeout { site, waited, missing }
        }
        other => other,
    })
}

impl Party<'_> {
    fn join(&self) -> Result<Seat<ShmNode>> {
        let (listener, contact) = self.prepare();
        let all = gather(self.options, "contact", &contact::to_bytes(&contact)?, self.deadline)?;
        let contacts: Vec<Contact> = contact::from_bytes(&self.options.name, &all)?;
        let listener = self.agreed(listener, contacts.iter().map(|c| c.error.as_deref()))?;

        let joined = self.reach(listener, &contacts);
        let outcome = Outcome { error: joined.as_ref().err().map(ToString::to_string) };
        let all = gather(self.options, "ready", &contact::to_bytes(&outcome)?, self.deadline)?;
        let outcomes: Vec<Outcome> = contact::from_bytes(&self.options.name, &all)?;
        self.agreed(joined, outcomes.iter().map(|o| o.error.as_deref()))
    }

    /// `mine`, when it went well everywhere. What failed here is told as it is; what failed elsewhere, as that rank's
    /// word. Nobody fails before all have read what failed: the store may be served by the first that does.
    fn agreed<'a, R>(
        &self,
        mine: Result<R>,
        errors: impl Iterator<Item = Option<&'a str>> + Clone,
    ) -> Result<R> {
        if errors.clone().any(|e| e.is_some()) {
            let farewell = self.deadline.min(Instant::now() + FAREWELL);
            // A rank that does not come to it knows already, or is beyond telling.
            let _ = gather(self.options, "farewell", &[], farewell);
        }
        let mine = mine?;
        self.first_error(errors)?;
        Ok(mine)
    }

    /// Opens what others will connect to. What failed is in both results: one for the others, one for here.
    fn prepare(&self) -> (Result<Option<Listener>>, Contact) {
        let opened = self.open();
        match opened {
            Ok((listener, fabric)) => {
                let socket = listener.as_ref().map(|l| l.name().to_owned());
                (Ok(listener), Contact { socket, fabric, error: None })
            }
            Err(error) => {
                let contact = Contact { error: Some(error.to_string()), ..Contact::default() };
                (Err(error), contact)
            }
        }
    }

    fn open(&self) -> Result<(Option<Listener>, Option<Vec<u8>>)> {
        let rank = self.options.rank;
        let first = self.shape.local_of(rank) == 0;
        let listener = if first { Some(Listener::bind().map_err(Error::from)?) } else { None };
        if self.shape.node_count() == 1 {
            return Ok((listener, None));
        }
        let open = || {
            let dirs = library_dirs(&self.options.library_dirs);
            let place = Place { number: self.shape.local_of(rank), of: self.shape.local_size(rank) };
            Ok(FabricEndpoint::open_at(&self.options.settings, &dirs, place)?)
        };
        let address = self.engine.with_fabric(open, |fabric| Ok(fabric.address()))?;
        Ok((listener, Some(address)))
    }

    fn reach(&self, listener: Option<Listener>, contacts: &[Contact]) -> Result<Seat<ShmNode>> {
        let rank = self.options.rank;
        let node = self.shape.ranks_on(self.shape.node_of(rank));
        let choice = self.shared_memory(listener.is_some());
        let settings = &self.options.settings;
        let who = Membership {
            group: self.hellos[0].id,
            secret: self.hellos[0].secret,
            local_rank: self.shape.local_of(rank),
            ranks: node.to_vec(),
            node: self.hellos[rank].node_name.clone(),
            single_copy: match settings.text("SMDDP_SHM_SINGLE_COPY") {
                "on" => SingleCopies::ALL,
                "off" => SingleCopies::NONE,
                _ => choice.single_copy,
            },
            hands_back: match settings.text("SMDDP_SHM_HAND_BACK") {
                "auto" => choice.hands_back,
                set => set == "on",
            },
            far: caches::far(settings),
            streams_from: caches::streams_from(settings),
            deadline: self.deadline,
        };
        let local = match listener {
            Some(listener) => listener.serve(&who, choice.geometry),
            None => ShmNode::connect(self.socket(node[0] as usize, contacts)?, &who),
        };
        Ok(Seat {
            id: self.hellos[0].id,
            name: self.options.name.as_str().into(),
            rank,
            shape: Arc::clone(&self.shape),
            local: local.map_err(Error::from)?,
            routes: self.routes(contacts)?,
        })
    }

    /// What the node's first rank chooses for the group; the others take what they are told. The first groups of a process get
    /// full rings; many more would take too much memory.
    fn shared_memory(&self, is_first: bool) -> Choice {
        let choice = match self.shape.ranks_on(self.shape.node_of(self.options.rank)) {
            [first, second, ..] if is_first => {
                let cores = |rank: u32| &*self.hellos[rank as usize].cores;
                // Beside groups that are at work a probe would measure them, too.
                let may_probe = self.engine.groups() == 0;
                slots::choose(&self.options.settings, cores(*first), cores(*second), may_probe)
            }
            _ => Choice::USUAL,
        };
        let full = choice.geometry;
        if self.engine.groups() < full_rings(full) {
            return choice;
        }
        let small =
            Geometry { slot: full.slot.min(SMALL_SLOT), slots: full.slots.min(Geometry::USUAL.slots) };
        Choice { geometry: small, ..choice }
    }

    fn socket<'a>(&self, first: usize, contacts: &'a [Contact]) -> Result<&'a str> {
        contacts[first].socket.as_deref().ok_or_else(|| Error::Bootstrap {
            what: format!(
                "rank {first} of group '{}' offers no shared memory to its node",
                self.options.name
            ),
            hint: "Install the same version of smdistributed_rs on every node".to_owned(),
        })
    }

    fn routes(&self, contacts: &[Contact]) -> Result<Vec<Route>> {
        let me = self.options.rank;
        let route = |rank: usize| {
            if self.shape.same_node(rank, me) {
                return Ok(Route::Local(self.shape.local_of(rank) as u32));
            }
            let address = contacts[rank].fabric.as_deref().unwrap_or_default();
            let label =
                format!("{} (rank {rank} of group '{}')", self.hellos[rank].node_name, self.options.name);
            let missing = || Err(Error::Internal("a group over several nodes without a fabric".to_owned()));
            Ok(Route::Fabric(self.engine.with_fabric(missing, |f| f.connect(address, &label))?))
        };
        (0..self.shape.size()).map(route).collect()
    }

    /// Somebody else's failure, with its rank.
    fn first_error<'a>(&self, errors: impl Iterator<Item = Option<&'a str>>) -> Result<()> {
        for (rank, error) in errors.enumerate() {
            if let Some(error) = error.filter(|_| rank != self.options.rank) {
                return Err(Error::Bootstrap {
                    what: format!("rank {rank} could not join group '{}': {error}", self.options.name),
                    hint: "Mend that rank; this one is well".to_owned(),
                });
            }
        }
        Ok(())
    }

    /// The cores that each rank of this machine may run on. One machine may play several nodes: the boot id, which a label
    /// begins with, tells machines apart.
    fn neighbours(&self) -> Vec<&[usize]> {
        let machine = |h: &Hello| h.node.split('/').next().unwrap_or_default().to_owned();
        let mine = machine(&self.hellos[self.options.rank]);
        self.hellos.iter().filter(|h| machine(h) == mine).map(|h| &*h.cores).collect()
    }
}

/// Identity and secret for a group, should this be rank 0.
fn random() -> Result<(u64, [u8; 32])> {
    let bytes: [u8; 40] = process::random().map_err(|e| Error::Internal(format!("no random bytes: {e}")))?;
    let mut secret = [0u8; 32];
    secret.copy_from_slice(&bytes[8..]);
    Ok((
        u64::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5], bytes[6], bytes[7]]),
        secret,
    ))
}

/// How many groups of a process have rings as large as `full`.
fn full_rings(full: Geometry) -> usize {
    (FULL_RINGS / full.bytes()).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_groups_have_full_rings_within_the_limit() {
        assert_eq!(full_rings(Geometry::USUAL), 8);
        assert_eq!(full_rings(Geometry { slot: 4 << 20, slots: 3 }), 1);
        for slot in [4 << 10, 64 << 10, 1 << 20, 2 << 20] {
            let full = Geometry { slot, slots: 4 };
            assert!(full_rings(full) * full.bytes() <= FULL_RINGS, "{slot}");
        }
    }
}
