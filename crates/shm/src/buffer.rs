//! Memory for a message that arrives before its receive is posted.

use smddp_core::Region;
use smddp_core::error::{Error, Result};

/// Bytes received so far; grows to a size known ahead.
#[derive(Default)]
pub(crate) struct Buffer {
    bytes: Vec<u8>,
}

impl Buffer {
    /// Room for `total` bytes, or a clean error: the number comes from a peer.
    pub(crate) fn with_room_for(total: usize) -> Result<Buffer> {
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(total).map_err(|e| Error::Resource {
            what: format!("holding a message of {total} bytes until its receive is posted"),
            resource: "memory",
            reason: e.to_string(),
            hint: "Post the receive before the peer sends, or send smaller messages".to_owned(),
        })?;
        Ok(Buffer { bytes })
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(crate) fn append(&mut self, from: Region) {
        let at = self.bytes.len();
        self.bytes.resize(at + from.len(), 0);
        self.region().slice(at, from.len()).copy_from(from);
    }

    /// All bytes received so far; used up before the buffer changes again.
    pub(crate) fn region(&mut self) -> Region {
        // SAFETY: every caller copies at once, while it holds the buffer.
        unsafe { Region::of(&mut self.bytes) }
    }
}
