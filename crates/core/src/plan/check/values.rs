//! Symbols: which contributions were combined, and how. Equal symbols are equal bits on any hardware.

use std::collections::HashMap;

/// An element of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cell {
    /// Index in the contributors' inputs.
    pub(super) element: u32,
    pub(super) value: ValueId,
}

impl Cell {
    /// Of memory that nothing has written.
    pub(super) const UNDEFINED: Cell = Cell { element: 0, value: ValueId(0) };

    pub(super) fn of(element: usize, rank: usize) -> Cell {
        Cell { element: element as u32, value: ValueId::leaf(rank) }
    }
}

/// Equal ids: the same contributions combined in the same tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct ValueId(u32);

impl ValueId {
    pub(super) const fn leaf(rank: usize) -> ValueId {
        ValueId(rank as u32 + 1)
    }
    pub(super) const fn is_defined(self) -> bool {
        self.0 != 0
    }
}

#[derive(Clone, Debug)]
struct Value {
    /// Bit r: rank r's contribution is in.
    set: Box<[u64]>,
    finished: bool,
}

pub(super) enum Wrong {
    Twice(usize),
    Finished,
}

/// All symbols of a run.
pub(super) struct Values {
    list: Vec<Value>,
    made: HashMap<(Box<[ValueId]>, bool), ValueId>,
}

impl Values {
    pub(super) fn new(ranks: usize) -> Values {
        let empty = Value { set: vec![0; ranks.div_ceil(64)].into(), finished: false };
        let leaf = |r: usize| {
            let mut value = empty.clone();
            value.set[r / 64] = 1 << (r % 64);
            value
        };
        Values {
            list: std::iter::once(empty.clone()).chain((0..ranks).map(leaf)).collect(),
            made: HashMap::new(),
        }
    }

    /// `parts` combined at once in this order. One part stays what it is.
    pub(super) fn combine(&mut self, parts: &[ValueId], finish: bool) -> Result<ValueId, Wrong> {
        if let ([one], false) = (parts, finish) {
            return Ok(*one);
        }
        let key = (parts.into(), finish);
        if let Some(&known) = self.made.get(&key) {
            return Ok(known);
        }
        let mut set = vec![0; self.list[0].set.len()];
        for part in parts {
            let part = &self.list[part.0 as usize];
            if part.finished {
                return Err(Wrong::Finished);
            }
            for (i, (sum, word)) in set.iter_mut().zip(&part.set).enumerate() {
                if *sum & word != 0 {
                    return Err(Wrong::Twice(i * 64 + (*sum & word).trailing_zeros() as usize));
                }
                *sum |= word;
            }
        }
        let id = ValueId(self.list.len() as u32);
        self.list.push(Value { set: set.into(), finished: finish });
        self.made.insert(key, id);
        Ok(id)
    }

    pub(super) fn finished(&self, id: ValueId) -> bool {
        self.list[id.0 as usize].finished
    }

    pub(super) fn contributors(&self, id: ValueId) -> Vec<usize> {
        let set = &self.list[id.0 as usize].set;
        (0..set.len() * 64).filter(|r| set[r / 64] >> (r % 64) & 1 == 1).collect()
    }

    pub(super) fn count(&self, id: ValueId) -> usize {
        self.list[id.0 as usize].set.iter().map(|w| w.count_ones() as usize).sum()
    }
}
