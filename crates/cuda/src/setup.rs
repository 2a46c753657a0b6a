//! What the ranks of a group settle with each other when its CUDA side is made.

use std::path::PathBuf;
use std::sync::Arc;

use smddp_core::communicator::Communicator;
use smddp_core::settings::Settings;
use smddp_core::transport::Transports;
use smddp_core::{Error, Result};

use crate::device::Device;
use crate::meeting;
use crate::nccl::{self, NcclComm};
use crate::stager::Stager;

/// Multiprocessors NCCL may use beside an exchange between nodes, which is slower than it anyway.
pub(crate) const MULTIPROCESSORS: u32 = 8;

/// What each rank says.
fn by_rank<T: Transports>(host: &Communicator<T>, mine: bool) -> Result<Vec<bool>> {
    let mut all = vec![false; host.size()];
    host.all_gather(&[mine], &mut all)?;
    Ok(all)
}

/// `mine`, when it went well on all ranks; else every rank fails, those it did not happen to by naming one of the others.
pub(crate) fn agreed<T: Transports, R>(host: &Communicator<T>, mine: Result<R>, what: &str) -> Result<R> {
    let failed = by_rank(host, mine.is_err());
    // Its own error says more than that of a group in which nobody hears of it any more.
    let (mine, failed) = (mine?, failed?);
    match failed.iter().position(|&failed| failed) {
        None => Ok(mine),
        Some(rank) => Err(Error::Bootstrap {
            what: format!("rank {rank} of group '{}' failed in {what}", host.name()),
            hint: "Its own error says why".to_owned(),
        }),
    }
}

/// Whether all ranks have `mine`; an error where some do and some do not.
pub(crate) fn on_all<T: Transports>(host: &Communicator<T>, mine: bool, what: &str) -> Result<bool> {
    match by_rank(host, mine)?.iter().position(|&theirs| theirs != mine) {
        None => Ok(mine),
        Some(rank) => Err(Error::Argument {
            op: format!("rank {} of group '{}', using CUDA", host.rank(), host.name()),
            argument: "settings",
            expected: format!("{what} on all ranks or on none"),
            given: format!("{mine} here, {} on rank {rank}", !mine),
            hint: "Give all ranks the same settings".to_owned(),
        }),
    }
}

/// Bytes for where a device sits.
const ROOM: usize = 32;

/// Where the devices of all ranks sit.
pub(crate) fn every_bus<T: Transports>(host: &Communicator<T>, bus_id: &str) -> Result<Vec<u8>> {
    let mut mine = [0u8; ROOM];
    let len = bus_id.len().min(ROOM);
    mine[..len].copy_from_slice(&bus_id.as_bytes()[..len]);
    let mut all = vec![0u8; ROOM * host.size()];
    host.all_gather(&mine, &mut all)?;
    Ok(all)
}

/// NCCL takes one rank a device.
pub(crate) fn refuse_shared_device<T: Transports>(host: &Communicator<T>, all: &[u8]) -> Result<()> {
    let (shape, me) = (host.shape(), host.rank());
    if std::env::var_os("NCCL_HOSTID").is_some() || std::env::var_os("NCCL_MULTI_RANK_GPU_ENABLE").is_some() {
        return Ok(());
    }
    for a in 0..host.size() {
        for b in a + 1..host.size() {
            if shape.same_node(a, b) && all[a * ROOM..(a + 1) * ROOM] == all[b * ROOM..(b + 1) * ROOM] {
                let theirs =
                    String::from_utf8_lossy(&all[a * ROOM..(a + 1) * ROOM]).trim_end_matches('\0').to_owned();
                return Err(Error::Argument {
                    op: format!("rank {me} of group '{}', using CUDA", host.name()),
                    argument: "device",
                    expected: "a device for each rank of a node".to_owned(),
                    given: format!("device {theirs} for ranks {a} and {b}"),
                    hint: "Call torch.cuda.set_device(local_rank) before the first collective; to let ranks share \
                           a device on purpose, set SMDDP_CUDA=staged"
                        .to_owned(),
                });
            }
        }
    }
    Ok(())
}

/// Who is in a communicator of NCCL.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Members {
    /// This node's ranks, beside exchanges between nodes.
    OfNode,
    All,
}

/// Every member of the group calls it at the same point.
pub(crate) fn meet<T: Transports>(
    host: &Communicator<T>,
    device: &Arc<Device>,
    settings: &Settings,
    dirs: &[PathBuf],
    who: Members,
) -> Result<NcclComm> {
    let me = host.rank();
    let members: Vec<usize> = match who {
        Members::All => (0..host.size()).collect(),
        Members::OfNode => {
            host.shape().ranks_on(host.shape().node_of(me)).iter().map(|&rank| rank as usize).collect()
        }
    };
    let max_ctas = (who == Members::OfNode).then_some(MULTIPROCESSORS);
    let loaded = nccl::library(settings.text("SMDDP_NCCL"), dirs).and_then(|library| {
        let id = if members[0] == me { nccl::unique_id(&library)?.0 } else { [0; 128] };
        Ok((library, id))
    });
    let (library, id) = agreed(host, loaded, "loading NCCL")?;
    let mut ids = vec![0u8; id.len() * host.size()];
    host.all_gather(&id, &mut ids)?;
    let mut theirs = [0u8; 128];
    let first = members[0];
    theirs.copy_from_slice(&ids[first * id.len()..(first + 1) * id.len()]);
    let place = (members.iter().position(|&rank| rank == me).unwrap_or_default(), members.len());
    let id = smddp_nccl_sys::UniqueId(theirs);
    let meeting = NcclComm::meet(&library, device, id, place, max_ctas);
    agreed(host, meeting::outcome(host, &members, meeting), "meeting for NCCL")
}

/// Whether the network goes to the stager's device memory: where the settings want it and all ranks can.
pub(crate) fn settle_direct<T: Transports>(
    host: &Communicator<T>,
    between: &Communicator<T>,
    settings: &Settings,
    stager: Option<&mut Stager>,
) -> Result<()> {
    const NAME: &str = "SMDDP_GPUDIRECT";
    let is_wanted = stager.is_some() && settings.text(NAME) == "on";
    let (true, Some(stager)) = (on_all(host, is_wanted, "SMDDP_GPUDIRECT=on")?, stager) else {
        return Ok(());
    };
    let offered = stager.offer_direct(between);
    let mut all = vec![0i64; host.size()];
    host.all_gather(&[*offered.as_ref().unwrap_or(&0) as i64], &mut all)?;
    let lacking = all.iter().position(|&least| least == 0);
    stager.settle_direct(if lacking.is_none() { all.iter().max().map(|&most| most as usize) } else { None });
    match (lacking, offered) {
        (_, Err(error)) => tracing::warn!(%error, "{NAME}=on has no effect in group '{}'", host.name()),
        (Some(rank), Ok(_)) => {
            tracing::warn!("{NAME}=on has no effect in group '{}': rank {rank} lacks it", host.name());
        }
        (None, Ok(_)) => {}
    }
    Ok(())
}
