//! Which shared-memory slots a node's ranks use, whether readers hand cache lines back, and which calls' large blocks go straight between the
//! ranks' memory: what the settings give, else what probes at the first starts on this machine found best, else the usual.
//!
//! What was found is kept in `smdistributed_rs/slots` in the user's cache folder, a line for each probe and kind of machine: a home may be
//! shared by several. Without such a folder nothing is probed, since it would cost every start.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use smddp_core::order::Order;
use smddp_core::settings::Settings;
use smddp_shm::probe::{self, BlockTimes, SlotTimes};
use smddp_shm::{Geometry, SingleCopies};

use crate::caches;

/// Grows when what is measured, or what runs, changes.
const VERSION: u32 = 10;
/// Starts that probe on a kind of machine, each in its own moment: what a machine does besides misleads one of them (docs/adr/0043).
const PROBES: usize = 3;
/// The usual slots come first.
const CANDIDATES: [Geometry; 4] = [
    Geometry::USUAL,
    Geometry { slot: 256 << 10, slots: 4 },
    Geometry { slot: 512 << 10, slots: 4 },
    Geometry { slot: 1 << 20, slots: 4 },
];

/// What groups use of a node's shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    pub geometry: Geometry,
    /// Which calls' large blocks go straight between the ranks' private memory, where `SMDDP_SHM_SINGLE_COPY` says nothing else.
    pub single_copy: SingleCopies,
    /// Readers hand cache lines back, where `SMDDP_SHM_HAND_BACK` says nothing else.
    pub hands_back: bool,
}

impl Choice {
    /// Where nothing better is known.
    pub const USUAL: Choice =
        Choice { geometry: Geometry::USUAL, single_copy: SingleCopies::ALL, hands_back: false };
}

/// Other slots must take at most so much of the usual ones' time: they take more memory, and the fastest times of two probes differ
/// by up to 3 %.
const WORTH: f64 = 0.95;
/// Handing lines back must take at most so much of the time without: where it gains nothing, what was written to leaves the caches
/// once more, and large broadcasts take up to a third longer.
const WORTH_HANDING: f64 = 0.95;
/// Slots must take at most so much of single copies' time: a machine that others use as well differs by a tenth from one moment to
/// the next.
const WORTH_SLOTS: f64 = 0.9;
/// Taking the segments down comes on top.
const LIMIT: Duration = Duration::from_millis(70);
/// For single copies, besides.
const BLOCKS_LIMIT: Duration = Duration::from_millis(20);

/// Where a choice comes from, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    Settings,
    Probe,
    Usual,
}

/// What a new group would use, as far as it is known without a probe.
pub fn known(settings: &Settings) -> (Choice, Origin) {
    if let Some(given) = given(settings) {
        return (given, Origin::Settings);
    }
    let found = cache_file().map(|path| remembered(&path, &machine())).unwrap_or_default();
    middle(&found).map_or((Choice::USUAL, Origin::Usual), |choice| (choice, Origin::Probe))
}

/// What a new group uses. Where little is known and it `may_probe`, probes for at most 0.1 s between this rank's cores and those of
/// another rank of its node; once in a process.
pub(crate) fn choose(
    settings: &Settings,
    own_cores: &[usize],
    peer_cores: &[usize],
    may_probe: bool,
) -> Choice {
    static FOUND: OnceLock<Choice> = OnceLock::new();
    // Two ranks on one core would measure how they take turns.
    let apart = own_cores.len() > 1 || own_cores != peer_cores;
    let measure = |path: &Path, machine: &str| {
        probed(path, machine, caches::far(settings), peer_cores, LIMIT).inspect_err(|why| {
            tracing::debug!("shared memory was not measured: {why}");
        })
    };
    given(settings).unwrap_or_else(|| *FOUND.get_or_init(|| find(may_probe && apart, measure)))
}

/// What was found before, and what `measure` finds if that is little and it `may_probe`.
fn find(may_probe: bool, measure: impl FnOnce(&Path, &str) -> Result<Choice, String>) -> Choice {
    let Some(path) = cache_file() else { return Choice::USUAL };
    let machine = machine();
    let mut found = remembered(&path, &machine);
    if found.len() < PROBES && may_probe {
        found.extend(measure(&path, &machine));
    }
    middle(&found).unwrap_or(Choice::USUAL)
}

/// Each part as the middle one of `found` has it: one that other work misled does not decide.
fn middle(found: &[Choice]) -> Option<Choice> {
    fn of<T: Ord>(parts: impl Iterator<Item = T>) -> Option<T> {
        let mut parts: Vec<T> = parts.collect();
        parts.sort_unstable();
        let middle = parts.len().checked_sub(1)? / 2;
        Some(parts.swap_remove(middle))
    }
    let (slot, slots) = of(found.iter().map(|choice| (choice.geometry.slot, choice.geometry.slots)))?;
    let single_copy = SingleCopies {
        mutual: of(found.iter().map(|choice| choice.single_copy.mutual))?,
        alone: of(found.iter().map(|choice| choice.single_copy.alone))?,
    };
    let hands_back = of(found.iter().map(|choice| choice.hands_back))?;
    Some(Choice { geometry: Geometry { slot, slots }, single_copy, hands_back })
}

fn given(settings: &Settings) -> Option<Choice> {
    let (slot, slots) = (settings.number_set("SMDDP_SHM_SLOT"), settings.number_set("SMDDP_SHM_SLOTS"));
    slot.or(slots)?;
    let usual = Geometry::USUAL;
    let geometry = Geometry { slot: slot.unwrap_or(usual.slot), slots: slots.unwrap_or(usual.slots) };
    Some(Choice { geometry, ..Choice::USUAL })
}

fn cache_file() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let cache = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))?;
    Some(cache.join("smdistributed_rs/slots"))
}

/// The processor's kind, and how many cores there are.
fn machine() -> String {
    const TELLING: [&str; 9] = [
        "vendor_id",
        "cpu family",
        "model",
        "model name",
        "stepping",
        "cache size",
        "CPU implementer",
        "CPU variant",
        "CPU part",
    ];
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let first = text.lines().take_while(|line| !line.is_empty());
    let words: Vec<&str> = first
        .filter_map(|line| line.split_once(':'))
        .filter(|(name, _)| TELLING.contains(&name.trim()))
        .map(|(_, value)| value.trim())
        .collect();
    let processors = text.lines().filter(|line| line.starts_with("processor")).count();
    format!("{VERSION} {processors} x {}", words.join("/").replace('=', "-"))
}

/// What probes have found on this kind of machine.
fn remembered(path: &Path, machine: &str) -> Vec<Choice> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let ways = |way: u32| [way & 1, way & 2, way & 4].map(|bit| bit > 0);
    let choice = |line: &str| {
        let found = line.strip_prefix(machine)?.strip_prefix(" = ")?;
        let mut choices = CANDIDATES.into_iter().flat_map(|geometry| {
            (0..8).map(ways).map(move |[mutual, alone, hands_back]| Choice {
                geometry,
                single_copy: SingleCopies { mutual, alone },
                hands_back,
            })
        });
        choices.find(|&choice| found == words(choice))
    };
    text.lines().filter_map(choice).collect()
}

fn words(choice: Choice) -> String {
    let Choice { geometry: Geometry { slot, slots }, single_copy, hands_back } = choice;
    let bits = [single_copy.mutual, single_copy.alone, hands_back].map(u8::from);
    format!("{slot} {slots} {} {} {}", bits[0], bits[1], bits[2])
}

/// Probes and remembers. One process of a machine at a time; another uses the usual slots meanwhile.
fn probed(
    path: &Path,
    machine: &str,
    far: Order,
    peer_cores: &[usize],
    limit: Duration,
) -> Result<Choice, String> {
    let said = |what: &'static str| move |e: io::Error| format!("{what} {}: {e}", path.display());
    let folder = path.parent().unwrap_or(path);
    fs::create_dir_all(folder).map_err(said("cannot make the folder of"))?;
    let file: File = OpenOptions::new().create(true).append(true).open(path).map_err(said("cannot write"))?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)
        .map_err(|_| "another process is measuring".to_owned())?;
    let slots = probe::slots(&CANDIDATES, far, peer_cores, limit).map_err(|e| e.to_string())?;
    let slots = slots.ok_or_else(|| format!("no result within {limit:?}"))?;
    let (geometry, hands_back) = best(&slots);
    let copies =
        probe::blocks(geometry, hands_back, far, peer_cores, BLOCKS_LIMIT).map_err(|e| e.to_string());
    let single_copy = match copies {
        Ok(Some(times)) => paying(times),
        _ => Choice::USUAL.single_copy,
    };
    let found = Choice { geometry, single_copy, hands_back };
    tracing::info!(?slots, ?copies, ?found, "shared memory was measured");
    // One write, so that a reader sees the whole line or none.
    io::Write::write_all(&mut &file, format!("{machine} = {}\n", words(found)).as_bytes())
        .map_err(said("cannot write"))?;
    Ok(found)
}

/// The usual slots unless others are clearly faster, of those the fastest; and whether readers hand lines back, where small
/// broadcasts take about as long with slots of any size. Elsewhere they count as much as all_reduce: the geometric mean of both.
fn best(times: &[SlotTimes]) -> (Geometry, bool) {
    let hands_back = times[0].handed_back < WORTH_HANDING * times[0].broadcast;
    let score = |times: &SlotTimes| {
        if hands_back { times.all_reduce } else { (times.all_reduce * times.broadcast).sqrt() }
    };
    let fastest = times.iter().map(score).zip(CANDIDATES).min_by(|a, b| a.0.total_cmp(&b.0));
    let geometry = match fastest {
        Some((time, geometry)) if time < WORTH * score(&times[0]) => geometry,
        _ => Geometry::USUAL,
    };
    (geometry, hands_back)
}

/// Single copies stay unless slots are clearly faster. `times` are those of slots and of single copies.
fn paying([slots, copies]: [BlockTimes; 2]) -> SingleCopies {
    SingleCopies {
        mutual: slots.mutual > WORTH_SLOTS * copies.mutual,
        alone: slots.alone > WORTH_SLOTS * copies.alone,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::cores;

    fn folder(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("smddp-slots-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        path
    }

    /// Of all_reduce, broadcast, and broadcast with lines handed back, by candidate.
    fn chosen(times: [[f64; 3]; 4]) -> (Geometry, bool) {
        best(&times.map(|[all_reduce, broadcast, handed_back]| SlotTimes {
            all_reduce,
            broadcast,
            handed_back,
        }))
    }

    #[test]
    fn the_usual_slots_stay_unless_others_are_clearly_faster() {
        let usual = [1.0, 1.0, 0.96];
        assert_eq!(chosen([usual, [1.0, 0.92, 1.0], [0.92, 1.0, 1.0], [2.0; 3]]), (Geometry::USUAL, false));
        assert_eq!(chosen([usual, [1.0, 0.7, 1.0], [0.9, 0.7, 1.0], [2.0; 3]]), (CANDIDATES[2], false));
    }

    #[test]
    fn where_lines_are_handed_back_the_slots_are_those_of_all_reduce() {
        let usual = [1.0, 1.0, 0.94];
        assert_eq!(chosen([usual, [0.96, 0.1, 0.1], [1.0; 3], [1.0; 3]]), (Geometry::USUAL, true));
        assert_eq!(chosen([usual, [0.94, 9.0, 9.0], [1.0; 3], [1.0; 3]]), (CANDIDATES[1], true));
    }

    #[test]
    fn single_copies_stay_unless_slots_are_clearly_faster() {
        let slots =
            |mutual, alone| paying([BlockTimes { mutual, alone }, BlockTimes { mutual: 1.0, alone: 1.0 }]);
        assert_eq!(slots(1.1, 0.95), SingleCopies::ALL);
        assert_eq!(slots(0.85, 0.95), SingleCopies { mutual: false, alone: true });
        assert_eq!(slots(0.95, 0.85), SingleCopies { mutual: true, alone: false });
    }

    #[test]
    fn what_a_probe_found_is_remembered_for_that_kind_of_machine() {
        let folder = folder("kept");
        let path = folder.join("deep/slots");
        assert_eq!(remembered(&path, "1 2 x this"), []);
        let found = probed(&path, "1 2 x this", Order::Straight, &cores(), Duration::from_secs(60)).unwrap();
        assert_eq!(remembered(&path, "1 2 x this"), [found]);
        assert_eq!(remembered(&path, "1 2 x that"), []);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn lines_of_other_versions_machines_and_nonsense_are_passed_over() {
        let folder = folder("lines");
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join("slots");
        let lines = "1 2 x this = 262144 4 0 1 1\n1 2 x this = 262144 4 0 1\n1 2 x this = 12 4 1 0 0\nnonsense\n1 4 x this = 524288 4 1 0 0\n1 2 x this = 131072 4 1 1 0\n0 2 x this = 262144 4 1 1 1\n";
        fs::write(&path, lines).unwrap();
        let choice = |at: usize, mutual, alone, hands_back| {
            let single_copy = SingleCopies { mutual, alone };
            Choice { geometry: CANDIDATES[at], single_copy, hands_back }
        };
        assert_eq!(
            remembered(&path, "1 2 x this"),
            [choice(1, false, true, true), choice(0, true, true, false)]
        );
        assert_eq!(remembered(&path, "1 4 x this"), [choice(2, true, false, false)]);
        assert_eq!(remembered(&path, "1 8 x this"), []);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn nothing_is_remembered_when_there_was_no_time_to_tell() {
        let folder = folder("late");
        let path = folder.join("slots");
        assert_eq!(
            probed(&path, "1 2 x this", Order::Straight, &cores(), Duration::ZERO),
            Err("no result within 0ns".to_owned())
        );
        assert_eq!(remembered(&path, "1 2 x this"), []);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn each_part_is_as_the_middle_probe_has_it() {
        let choice = |at: usize, mutual, alone, hands_back| Choice {
            geometry: CANDIDATES[at],
            single_copy: SingleCopies { mutual, alone },
            hands_back,
        };
        let (one, two, three) =
            (choice(2, true, false, true), choice(0, false, false, true), choice(1, true, true, false));
        assert_eq!(middle(&[]), None);
        assert_eq!(middle(&[one]), Some(one));
        assert_eq!(middle(&[one, two, three]), Some(choice(1, true, false, true)));
        assert_eq!(middle(&[one, two]), Some(choice(0, false, false, true)));
    }

    #[test]
    fn two_processes_do_not_measure_at_the_same_time() {
        let folder = folder("locked");
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join("slots");
        let holder = File::create(&path).unwrap();
        flock(&holder, FlockOperation::NonBlockingLockExclusive).unwrap();
        assert_eq!(
            probed(&path, "1 2 x this", Order::Straight, &cores(), LIMIT),
            Err("another process is measuring".to_owned())
        );
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn settings_come_first() {
        let with = |name: &str, value: &str| {
            let settings = Settings::from_vars([(name.to_owned(), value.to_owned())]).unwrap();
            let (choice, origin) = known(&settings);
            (choice.geometry, origin)
        };
        assert_eq!(with("SMDDP_SHM_SLOT", "64K"), (Geometry { slot: 64 << 10, slots: 4 }, Origin::Settings));
        assert_eq!(with("SMDDP_SHM_SLOTS", "7"), (Geometry { slot: 128 << 10, slots: 7 }, Origin::Settings));
    }
}
