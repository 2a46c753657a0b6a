//! How large this machine's caches are, and what follows from it.

use std::fs;
use std::path::{Path, PathBuf};

use smddp_core::order::Order;
use smddp_core::settings::{Settings, parse_bytes};

/// Machines with larger last-level caches share them among many cores, of which a job may have few.
const MOST: usize = 128 << 20;

/// Results share the last-level cache with inputs and slots.
const SHARE: usize = 2;

/// What the kernel says of the first core's.
const CACHES: &str = "/sys/devices/system/cpu/cpu0/cache";

/// Lines of a set of the first cache that four pages at once take where an all_reduce of two ranks goes over its own data, its
/// peer's, and the slot that the result goes to as well: lines at one place of each page share a set (docs/adr/0042).
const FOUR_PAGES: usize = 4 * 3;

/// The order in which a rank reads much that comes from far. Straight, where the first cache is not known.
pub fn far(settings: &Settings) -> Order {
    let four_pages = match settings.text("SMDDP_SHM_FOUR_PAGES") {
        "auto" => first_ways(Path::new(CACHES)).is_some_and(|ways| ways >= FOUR_PAGES),
        set => set == "on",
    };
    if four_pages { Order::FourPages } else { Order::Straight }
}

/// Lines that a set of the first data cache holds.
fn first_ways(folder: &Path) -> Option<usize> {
    let read = |cache: &Path, field: &str| fs::read_to_string(cache.join(field)).unwrap_or_default();
    let mut caches = fs::read_dir(folder).ok()?.flatten().map(|cache| cache.path());
    let is_first = |cache: &PathBuf| {
        read(cache, "level").trim() == "1" && matches!(read(cache, "type").trim(), "Data" | "Unified")
    };
    read(&caches.find(is_first)?, "ways_of_associativity").trim().parse().ok()
}

/// From how many bytes on results of a node's ranks, all together, do not stay in the caches, so that they are stored past them;
/// `None`: never, or unknown.
pub fn streams_from(settings: &Settings) -> Option<usize> {
    let from = settings
        .number_set("SMDDP_SHM_STREAM")
        .or_else(|| Some(last_level(Path::new(CACHES))?.min(MOST) / SHARE));
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
    fn the_ways_are_those_of_the_first_data_cache() {
        let folder = std::env::temp_dir().join(format!("smddp-ways-{}", std::process::id()));
        let caches = [
            ("index0", "1", "Instruction", "16"),
            ("index1", "1", "Data", "12"),
            ("index2", "2", "Unified", "8"),
        ];
        for (name, level, kind, ways) in caches {
            fs::create_dir_all(folder.join(name)).unwrap();
            for (field, value) in [("level", level), ("type", kind), ("ways_of_associativity", ways)] {
                fs::write(folder.join(name).join(field), format!("{value}\n")).unwrap();
            }
        }
        assert_eq!(first_ways(&folder), Some(12));
        fs::remove_dir_all(folder.join("index1")).unwrap();
        assert_eq!(first_ways(&folder), None);
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn pages_are_read_as_set() {
        let with = |value: &str| {
            let vars = [("SMDDP_SHM_FOUR_PAGES".to_owned(), value.to_owned())];
            far(&Settings::from_vars(vars).unwrap())
        };
        assert_eq!(["on", "off"].map(with), [Order::FourPages, Order::Straight]);
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
