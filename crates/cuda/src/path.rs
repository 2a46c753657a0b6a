//! How a group's calls go, and which communicators that takes.

use smddp_core::GroupShape;
use smddp_core::settings::Settings;

/// How a group's calls go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// NCCL does everything: all ranks are on one node, or the settings say so.
    Nccl,
    /// NCCL inside the node, pinned memory and the rail between nodes.
    Hierarchical,
    /// Through pinned memory and the host's group.
    Staged,
    /// This rank is alone.
    Alone,
}

impl Path {
    pub(crate) fn of(shape: &GroupShape, settings: &Settings) -> Path {
        match (settings.text("SMDDP_CUDA"), shape.node_count()) {
            ("staged", _) => Path::Staged,
            ("nccl", _) => Path::Nccl,
            (_, 1) if shape.size() == 1 => Path::Alone,
            (_, 1) => Path::Nccl,
            _ if shape.even_local_size().is_some_and(|local| local > 1) => Path::Hierarchical,
            _ => Path::Staged,
        }
    }
}

/// The communicators that a group's CUDA side wants beside the group's own; the same on all ranks, but for who is in the rail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// One of all members, for calls that pass through the host: their order among the group's calls on CPU tensors, which another
    /// thread may make, is not the same on all ranks.
    pub own: bool,
    /// One of these ranks: those with this one's local rank, in node order.
    pub rail: Option<Vec<usize>>,
}

impl Wanted {
    /// What `rank` wants in a group of this shape.
    pub fn of(shape: &GroupShape, rank: usize, settings: &Settings) -> Wanted {
        let path = Path::of(shape, settings);
        let local = shape.local_of(rank);
        let rail = || (0..shape.node_count()).map(|node| shape.ranks_on(node)[local] as usize).collect();
        Wanted {
            own: matches!(path, Path::Staged | Path::Hierarchical),
            rail: (path == Path::Hierarchical).then(rail),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(shape: &GroupShape, rank: usize, setting: &str) -> Wanted {
        let settings = Settings::from_vars([("SMDDP_CUDA".to_owned(), setting.to_owned())]).unwrap();
        Wanted::of(shape, rank, &settings)
    }

    #[test]
    fn what_passes_through_the_host_has_a_communicator_of_its_own() {
        let (one, even, alone) = (GroupShape::even(1, 2), GroupShape::even(2, 2), GroupShape::even(2, 1));
        let (nothing, own) = (Wanted { own: false, rail: None }, Wanted { own: true, rail: None });
        assert_eq!(wanted(&one, 1, "auto"), nothing);
        assert_eq!(wanted(&one, 1, "staged"), own);
        assert_eq!(wanted(&alone, 1, "auto"), own);
        assert_eq!(wanted(&even, 1, "nccl"), nothing);
        assert_eq!(wanted(&even, 1, "staged"), own);
        assert_eq!(wanted(&even, 3, "auto"), Wanted { own: true, rail: Some(vec![1, 3]) });
    }
}
