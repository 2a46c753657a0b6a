//! Numbered boxes: items found by a handle that goes stale when its item is removed.

/// 16 bits of index, 16 bits of generation: a handle of a removed item finds nothing until 65,536 others have had
/// its place. Fits the 32 bits of immediate data that every provider carries.
pub type Handle = u32;

const LIMIT: usize = 1 << 16;

#[derive(Debug)]
pub struct Slab<T> {
    items: Vec<(u16, Option<T>)>,
    free: Vec<u16>,
}

impl<T> Slab<T> {
    pub fn with_capacity(n: usize) -> Slab<T> {
        Slab { items: Vec::with_capacity(n), free: Vec::with_capacity(n) }
    }

    /// `None` when 65,536 items are live.
    pub fn insert(&mut self, item: T) -> Option<Handle> {
        let index = match self.free.pop() {
            Some(index) => index,
            None if self.items.len() < LIMIT => {
                self.items.push((0, None));
                (self.items.len() - 1) as u16
            }
            None => return None,
        };
        let (generation, place) = &mut self.items[index as usize];
        *place = Some(item);
        Some(u32::from(*generation) << 16 | u32::from(index))
    }

    pub fn get(&self, handle: Handle) -> Option<&T> {
        let (generation, item) = self.items.get((handle & 0xffff) as usize)?;
        if u32::from(*generation) == handle >> 16 { item.as_ref() } else { None }
    }

    pub fn get_mut(&mut self, handle: Handle) -> Option<&mut T> {
        let (generation, item) = self.items.get_mut((handle & 0xffff) as usize)?;
        if u32::from(*generation) == handle >> 16 { item.as_mut() } else { None }
    }

    pub fn remove(&mut self, handle: Handle) -> Option<T> {
        let (generation, place) = self.items.get_mut((handle & 0xffff) as usize)?;
        if u32::from(*generation) != handle >> 16 {
            return None;
        }
        let item = place.take()?;
        *generation = generation.wrapping_add(1);
        self.free.push((handle & 0xffff) as u16);
        Some(item)
    }

    pub fn iter(&self) -> impl Iterator<Item = (Handle, &T)> {
        self.items
            .iter()
            .enumerate()
            .filter_map(|(i, (g, item))| Some((u32::from(*g) << 16 | i as u32, item.as_ref()?)))
    }

    /// The first live item at or after place `from`, and the place after it; for walks that go on another time.
    pub fn after(&self, from: usize) -> Option<(Handle, usize)> {
        let i = (from..self.items.len()).find(|i| self.items[*i].1.is_some())?;
        Some((u32::from(self.items[i].0) << 16 | i as u32, i + 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_handle_finds_nothing() {
        let mut slab = Slab::with_capacity(1);
        let a = slab.insert('a').unwrap();
        assert_eq!(slab.remove(a), Some('a'));
        let b = slab.insert('b').unwrap();
        assert_eq!(a & 0xffff, b & 0xffff, "the place is used again");
        assert_eq!((slab.get(a), slab.get(b)), (None, Some(&'b')));
        assert_eq!((slab.remove(a), slab.iter().count()), (None, 1));
        assert_eq!(slab.get(12345), None);
    }

    #[test]
    fn it_is_full_at_its_limit() {
        let mut slab = Slab::with_capacity(0);
        for i in 0..LIMIT {
            assert!(slab.insert(i).is_some());
        }
        assert_eq!(slab.insert(0), None);
    }
}
