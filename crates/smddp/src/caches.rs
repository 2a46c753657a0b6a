//! How large this machine's caches are.

use std::fs;
use std::path::Path;

use smddp_core::settings::{Settings, parse_bytes};

/// Machines with larger last-level caches share them among many cores, of which a job may have few.
const MOST: usize = 128 << 20;

/// Results share the last-level cache with inputs and slots.
const SHARE: usize = 2;

/// From how many bytes on results of a node's ranks, all together, do not stay in the caches, so that they are stored past them;
/// `None`: never, or unknown.
pub fn streams_from(settings: &Settings) -> Option<usize> {
    let from = settings
        .number_set("SMDDP_SHM_STREAM")
        .or_else(|| Some(last_level(Path::new("/sys/devices/system/cpu/cpu0/cache"))?.min(MOST) / SHARE));
    from.filter(|&bytes| bytes > 0)
}

/// Bytes of the largest cache in the kernel's description of them.
fn last_level(folder: &Path) -> Option<usize> {
    let caches = fs::read_dir(folder).ok()?.flatten();
    let sizes = caches.filter_map(|cache| fs::read_to_string(cache.path().join("size")).ok());
    sizes.filter_map(|size| parse_bytes(size.trim())).max().map(|bytes| bytes as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_cache_is_the_last_level() {
        let folder = std::env::temp_dir().join(format!("smddp-caches-{}", std::process::id()));
        for (name, size) in
            [("index0", "32K\n"), ("index3", "32768K\n"), ("index2", "1024K\n"), ("index4", "much")]
        {
            fs::create_dir_all(folder.join(name)).unwrap();
            fs::write(folder.join(name).join("size"), size).unwrap();
        }
        fs::write(folder.join("uevent"), "").unwrap();
        assert_eq!(last_level(&folder), Some(32 << 20));
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(last_level(&folder), None);
    }

    #[test]
    fn a_setting_comes_first_and_nought_is_never() {
        let with = |value: &str| {
            let vars = [("SMDDP_SHM_STREAM".to_owned(), value.to_owned())];
            streams_from(&Settings::from_vars(vars).unwrap())
        };
        assert_eq!(with("1G"), Some(1 << 30));
        assert_eq!(with("0"), None);
        assert!(with("").is_none_or(|bytes| bytes <= MOST));
    }
}
