//! Which way a call on CUDA memory takes between nodes: one table. `SMDDP_CUDA_ALGORITHM` overrides it, by collective and bytes.

use smddp_core::plan::CallShape;
use smddp_core::plan::Override;
use smddp_core::settings::Settings;
use smddp_core::{Collective, Result};

use crate::call::DeviceCall;
use crate::hierarchical;
use crate::nccl;

/// A call's way in a group of several ranks on each of several nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// NCCL inside the nodes, pinned memory and the rail between them.
    Hierarchical,
    /// Whole through pinned memory and the host's group.
    Staged,
    /// NCCL over all ranks, between nodes by its own network.
    Flat,
}

const HIERARCHICAL: &str = "hierarchical";
const STAGED: &str = "staged";
const FLAT: &str = "nccl";

/// The ways of a collective by name, the usual one first. What a way cannot carry is staged.
const fn ways(collective: Collective) -> &'static [&'static str] {
    match collective {
        Collective::AllReduce | Collective::ReduceScatter | Collective::AllGather | Collective::Broadcast => {
            &[HIERARCHICAL, STAGED, FLAT]
        }
        Collective::AllToAll | Collective::Reduce | Collective::Gather | Collective::Scatter => {
            &[STAGED, FLAT]
        }
        Collective::Barrier | Collective::SendRecv => &[],
    }
}

/// The ways as the settings leave them.
#[derive(Debug)]
pub(crate) struct Selection {
    overrides: Vec<Override>,
}

impl Selection {
    pub(crate) fn new(settings: &Settings) -> Result<Selection> {
        const NAME: &str = "SMDDP_CUDA_ALGORITHM";
        Ok(Selection { overrides: Override::parse_for(NAME, settings.text(NAME), ways)? })
    }

    /// Whether a call may go by NCCL over all ranks.
    pub(crate) fn has_flat(&self) -> bool {
        self.overrides.iter().any(|o| o.algorithm == FLAT)
    }

    /// The way of a call in a group of `size` ranks.
    pub(crate) fn way(&self, call: &DeviceCall, size: usize) -> Way {
        let shape = CallShape {
            counts: call.counts.clone(),
            ..CallShape::new(call.collective, call.dtype.size(), call.count)
        };
        let bytes = shape.bytes(size);
        let chosen = self.overrides.iter().find(|o| o.fits(call.collective, bytes)).map(|o| o.algorithm);
        match chosen.or_else(|| ways(call.collective).first().copied()) {
            Some(FLAT) if nccl::has_reduction(call) => Way::Flat,
            Some(HIERARCHICAL) if hierarchical::carries(call) => Way::Hierarchical,
            _ => Way::Staged,
        }
    }
}

#[cfg(test)]
mod tests {
    use smddp_core::{DType, ReduceOp};

    use super::*;
    use crate::call::Memory;

    fn selection(text: &str) -> Result<Selection> {
        let given = [("SMDDP_CUDA_ALGORITHM".to_owned(), text.to_owned())];
        Selection::new(&Settings::from_vars(given)?)
    }

    fn call(collective: Collective, dtype: DType, count: usize) -> DeviceCall {
        let none = Memory { address: 0, bytes: 0 };
        DeviceCall {
            collective,
            dtype,
            op: ReduceOp::Sum,
            root: 0,
            count,
            input: none,
            output: none,
            counts: None,
            splits: None,
            timeout: None,
        }
    }

    #[test]
    fn the_first_way_that_carries_a_call_is_taken_unless_the_setting_has_another() {
        let usual = selection("").unwrap();
        assert!(!usual.has_flat());
        assert_eq!(usual.way(&call(Collective::AllReduce, DType::F32, 1), 4), Way::Hierarchical);
        assert_eq!(usual.way(&call(Collective::AllReduce, DType::I16, 1), 4), Way::Staged);
        assert_eq!(usual.way(&call(Collective::AllToAll, DType::F32, 1), 4), Way::Staged);

        let other = selection("all_reduce:0-64K=nccl, all_gather=staged").unwrap();
        assert!(other.has_flat());
        let sum = |count| other.way(&call(Collective::AllReduce, DType::F32, count), 4);
        assert_eq!((sum(16 << 10), sum((16 << 10) + 1)), (Way::Flat, Way::Hierarchical));
        // NCCL has no such type.
        assert_eq!(other.way(&call(Collective::AllReduce, DType::I16, 1), 4), Way::Staged);
        assert_eq!(other.way(&call(Collective::AllGather, DType::F32, 1), 4), Way::Staged);
        assert_eq!(other.way(&call(Collective::Broadcast, DType::F32, 1), 4), Way::Hierarchical);
    }

    #[test]
    fn a_way_that_a_collective_has_not_is_refused_by_name() {
        for text in ["all_to_all=hierarchical", "barrier=nccl", "all_reduce=ring"] {
            let error = selection(text).unwrap_err().to_string();
            assert!(error.contains("SMDDP_CUDA_ALGORITHM"), "{error}");
        }
    }
}
