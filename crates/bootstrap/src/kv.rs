//! The map behind every store of ours: values, counters, and the bounds that keep a mistake from eating the memory.

use std::collections::HashMap;
use std::sync::Arc;

/// Longest key.
pub(crate) const MAX_KEY: usize = 1024;
/// Longest value: the addresses of thousands of ranks fit many times.
pub(crate) const MAX_VALUE: usize = 16 << 20;
/// All keys and values together.
const MAX_TOTAL: usize = 512 << 20;

/// Refuses keys and values out of bounds, on the sender's side already.
pub(crate) fn check(key: &str, value_len: usize) -> Result<(), String> {
    if key.is_empty() || key.len() > MAX_KEY {
        return Err(format!("keys have 1 to {MAX_KEY} bytes, this one {}", key.len()));
    }
    if value_len > MAX_VALUE {
        return Err(format!("values have up to {MAX_VALUE} bytes, this one {value_len}"));
    }
    Ok(())
}

#[derive(Debug, Default)]
pub(crate) struct Table {
    map: HashMap<String, Arc<[u8]>>,
    bytes: usize,
}

impl Table {
    pub(crate) fn get(&self, key: &str) -> Option<Arc<[u8]>> {
        self.map.get(key).cloned()
    }

    pub(crate) fn set(&mut self, key: &str, value: &[u8]) -> Result<(), String> {
        check(key, value.len())?;
        let before = self.map.get(key).map_or(0, |old| old.len() + key.len());
        let after = self.bytes - before + key.len() + value.len();
        if after > MAX_TOTAL {
            return Err(format!("the store is full: it takes {MAX_TOTAL} bytes in all"));
        }
        self.bytes = after;
        self.map.insert(key.to_owned(), Arc::from(value));
        Ok(())
    }

    /// Counters are decimal text under their key, as in torch's stores.
    pub(crate) fn add(&mut self, key: &str, amount: i64) -> Result<i64, String> {
        let old = match self.map.get(key) {
            None => 0,
            Some(value) => std::str::from_utf8(value)
                .ok()
                .and_then(|text| text.parse::<i64>().ok())
                .ok_or_else(|| "its value is not a counter".to_owned())?,
        };
        let new = old.checked_add(amount).ok_or_else(|| format!("{old} + {amount} overflows"))?;
        self.set(key, new.to_string().as_bytes())?;
        Ok(new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_hold_and_replacing_does_not_leak() {
        let mut table = Table::default();
        assert!(table.set("", b"x").is_err());
        assert!(table.set(&"k".repeat(MAX_KEY + 1), b"x").is_err());
        let large = vec![0u8; MAX_VALUE + 1];
        assert!(table.set("k", &large).is_err());
        for _ in 0..100 {
            table.set("k", &large[..MAX_VALUE]).unwrap();
        }
        let fits = MAX_TOTAL / (MAX_VALUE + 8);
        assert!((0..=fits).any(|i| table.set(&format!("{i:07}"), &large[..MAX_VALUE]).is_err()));
    }

    #[test]
    fn counters_count_and_refuse_what_is_none() {
        let mut table = Table::default();
        assert_eq!(table.add("c", 2), Ok(2));
        assert_eq!(table.add("c", -5), Ok(-3));
        table.set("t", b"text").unwrap();
        assert!(table.add("t", 1).is_err());
        table.set("m", i64::MAX.to_string().as_bytes()).unwrap();
        assert!(table.add("m", 1).is_err());
    }
}
