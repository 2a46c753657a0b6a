//! The store of a job of one process, and of tests whose ranks are threads.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

use smddp_core::store::Store;

use crate::error::Error;
use crate::kv::Table;

/// A map in this process. Share it among threads by `Arc`.
#[derive(Debug, Default)]
pub struct LocalStore {
    table: Mutex<Table>,
    changed: Condvar,
}

impl LocalStore {
    pub fn new() -> LocalStore {
        LocalStore::default()
    }
}

fn refused(key: &str) -> impl FnOnce(String) -> smddp_core::Error {
    let key = key.to_owned();
    move |reason| Error::Refused { key, reason }.into()
}

impl Store for LocalStore {
    fn set(&self, key: &str, value: &[u8]) -> smddp_core::Result<()> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.set(key, value).map_err(refused(key))?;
        self.changed.notify_all();
        Ok(())
    }

    fn get(&self, key: &str, deadline: Instant) -> smddp_core::Result<Vec<u8>> {
        let start = Instant::now();
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(value) = table.get(key) {
                return Ok(value.to_vec());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Timeout { key: key.to_owned(), waited: start.elapsed() }.into());
            }
            (table, _) = self.changed.wait_timeout(table, left).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn add(&self, key: &str, amount: i64) -> smddp_core::Result<i64> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let new = table.add(key, amount).map_err(refused(key))?;
        self.changed.notify_all();
        Ok(new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::time::Duration;

    #[test]
    fn a_waiting_get_sees_a_later_set() {
        let store = Arc::new(LocalStore::new());
        let other = Arc::clone(&store);
        let waiter = std::thread::spawn(move || other.get("k", Instant::now() + Duration::from_secs(60)));
        store.set("k", b"v").unwrap();
        assert_eq!(waiter.join().unwrap().unwrap(), b"v");
    }

    #[test]
    fn a_get_ends_at_its_deadline_and_names_the_key() {
        let error = LocalStore::new().get("absent", Instant::now()).unwrap_err();
        assert!(matches!(error, smddp_core::Error::Timeout { .. }), "{error}");
        assert!(error.to_string().contains("absent"), "{error}");
    }
}
