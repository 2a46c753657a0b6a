//! Who sits where: the ranks of a group on their nodes.

use std::collections::HashMap;

use crate::error::{Error, Result};

/// A group's ranks on nodes. Nodes are numbered by their lowest group rank; local ranks by group rank.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct GroupShape {
    node_of: Vec<u32>,
    local_of: Vec<u32>,
    nodes: Vec<Vec<u32>>,
}

impl GroupShape {
    /// From each group rank's node label (any values; equal labels share a node).
    pub fn from_labels<T: Eq + std::hash::Hash>(labels: &[T]) -> GroupShape {
        let mut index: HashMap<&T, usize> = HashMap::new();
        let mut nodes: Vec<Vec<u32>> = Vec::new();
        let mut node_of = Vec::with_capacity(labels.len());
        let mut local_of = Vec::with_capacity(labels.len());
        for (rank, label) in labels.iter().enumerate() {
            let node = *index.entry(label).or_insert_with(|| {
                nodes.push(Vec::new());
                nodes.len() - 1
            });
            node_of.push(node as u32);
            local_of.push(nodes[node].len() as u32);
            nodes[node].push(rank as u32);
        }
        GroupShape { node_of, local_of, nodes }
    }

    /// `nodes` nodes of `local` ranks each, ranks in order.
    pub fn even(nodes: usize, local: usize) -> GroupShape {
        let labels: Vec<usize> = (0..nodes * local).map(|r| r / local.max(1)).collect();
        GroupShape::from_labels(&labels)
    }

    /// One entry a node: how many ranks it holds, ranks in order.
    pub fn uneven(locals: &[usize]) -> GroupShape {
        let labels: Vec<usize> =
            locals.iter().enumerate().flat_map(|(n, &l)| std::iter::repeat_n(n, l)).collect();
        GroupShape::from_labels(&labels)
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.node_of.len()
    }

    pub fn node_count(&self) -> usize {
        self.nodes.len()
    }

    /// Group ranks on `node`, ascending; the index is the local rank.
    pub fn ranks_on(&self, node: usize) -> &[u32] {
        &self.nodes[node]
    }

    pub fn node_of(&self, rank: usize) -> usize {
        self.node_of[rank] as usize
    }

    pub fn local_of(&self, rank: usize) -> usize {
        self.local_of[rank] as usize
    }

    /// How many ranks share `rank`'s node.
    pub fn local_size(&self, rank: usize) -> usize {
        self.nodes[self.node_of(rank)].len()
    }

    /// The number of ranks every node holds, when they all hold the same.
    pub fn even_local_size(&self) -> Option<usize> {
        let first = self.nodes.first()?.len();
        self.nodes.iter().all(|n| n.len() == first).then_some(first)
    }

    pub fn min_local_size(&self) -> usize {
        self.nodes.iter().map(Vec::len).min().unwrap_or(0)
    }

    pub fn same_node(&self, a: usize, b: usize) -> bool {
        self.node_of[a] == self.node_of[b]
    }

    /// Checks that `rank` is a rank of this group.
    pub fn check_rank(&self, op: &str, argument: &'static str, rank: usize) -> Result<()> {
        if rank < self.size() {
            return Ok(());
        }
        Err(Error::Argument {
            op: op.to_owned(),
            argument,
            expected: format!("a rank of the group, 0 to {}", self.size().saturating_sub(1)),
            given: rank.to_string(),
            hint: "Ranks are counted within the group, from 0".to_owned(),
        })
    }
}

impl std::fmt::Display for GroupShape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.even_local_size() {
            Some(local) => write!(f, "{}x{local}", self.node_count()),
            None => {
                let sizes: Vec<String> = self.nodes.iter().map(|n| n.len().to_string()).collect();
                f.write_str(&sizes.join("+"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_ranks_are_numbered_by_node_and_order() {
        let shape = GroupShape::from_labels(&["b", "a", "b", "a", "c"]);
        assert_eq!(shape.node_count(), 3);
        assert_eq!(shape.ranks_on(0), &[0, 2]);
        assert_eq!(shape.ranks_on(1), &[1, 3]);
        assert_eq!(shape.local_of(3), 1);
        assert_eq!(shape.even_local_size(), None);
        assert_eq!(shape.to_string(), "2+2+1");
        assert_eq!(GroupShape::even(3, 2).to_string(), "3x2");
    }
}
