//! The `SMDDP_STANDIN_*` variables: what goes wrong, and when. Read once a process.

use std::str::FromStr;
use std::sync::OnceLock;
use std::time::Duration;

/// One function that shall fail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    pub function: String,
    /// Which call, from 1.
    pub nth: u64,
    /// All calls from the `nth` on.
    pub always: bool,
    pub code: i32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitValue {
    Works,
    /// Both memory operations answer NOT_SUPPORTED.
    Unsupported,
    /// A wait is taken, and never sees what the host stores; what a stream stores, it sees.
    Never,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Poison {
    Off,
    /// When the operation starts on its stream: right programs never see it.
    Start,
    /// When it is queued: stricter, for destinations nobody may use until the operation is done.
    Enqueue,
}

/// Whether all streams share a queue, as hardware with one connection has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OneQueue {
    Off,
    /// Operations run in the order in which they were given.
    InOrder,
    /// In the worst order that streams and events allow: waits for words before whatever else may run.
    Any,
}

/// Whether others may read and write devices' memory, and how a stream sees what they wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GpuDirect {
    Off,
    /// Writes arrive in order.
    Ordered,
    /// Waits for words take the flag that flushes them.
    Flush,
    /// As `Ordered`, on a device that uses the host's page tables (attribute 100), over a link of its own beside PCIe.
    Coherent,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerLoss {
    /// Operations that need a rank which has left fail with ncclRemoteError.
    Error,
    /// They wait for it until they are aborted, as kernels on real devices do.
    Hang,
}

/// When the ranks of a communicator of NCCL connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connect {
    /// As they make it.
    Init,
    /// At the first call of each rank, which blocks the host until all have made theirs.
    Call,
}

#[derive(Clone, Debug)]
pub struct Switches {
    pub devices: i32,
    pub memory: u64,
    pub driver_version: i32,
    pub nccl_version: i32,
    pub seed: u64,
    pub delay_max: Duration,
    /// A copy to pinned memory takes so long between its start and its data.
    pub copy_time: Duration,
    pub faults: Vec<Fault>,
    pub wait_value: WaitValue,
    pub one_queue: OneQueue,
    /// Operations that a queue holds beside the one that runs; who gives it more blocks. 0: as many as come.
    pub queue_depth: usize,
    pub free_lock: bool,
    pub poison: Poison,
    pub peer_loss: PeerLoss,
    pub connect: Connect,
    pub gpudirect: GpuDirect,
    pub host_alias: bool,
    pub any_pointer: bool,
    pub hang_limit: Duration,
    pub quiet: bool,
}

impl Switches {
    /// As the environment says. A value that cannot be read ends the process: a test must not run with less
    /// trouble than it asked for.
    pub fn get() -> &'static Self {
        static SWITCHES: OnceLock<Switches> = OnceLock::new();
        SWITCHES.get_or_init(|| {
            Self::parse(|name| std::env::var(name).ok()).unwrap_or_else(|why| {
                eprintln!("smddp stand-in: {why}");
                std::process::exit(2);
            })
        })
    }

    pub fn parse(var: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        let var = |name: &str| var(&format!("SMDDP_STANDIN_{name}"));
        Ok(Self {
            devices: number(&var, "DEVICES", 8)?,
            memory: number(&var, "MEMORY", 8 << 30)?,
            driver_version: number(&var, "DRIVER_VERSION", 13_000)?,
            nccl_version: number(&var, "NCCL_VERSION", 22_809)?,
            seed: number(&var, "SEED", 0)?,
            delay_max: Duration::from_micros(number(&var, "DELAY_US", 0)?),
            copy_time: Duration::from_micros(number(&var, "COPY_US", 0)?),
            faults: var("FAIL").map_or(Ok(Vec::new()), |text| text.split(',').map(fault).collect())?,
            wait_value: choice(
                &var,
                "WAIT_VALUE",
                &[
                    ("works", WaitValue::Works),
                    ("unsupported", WaitValue::Unsupported),
                    ("never", WaitValue::Never),
                ],
            )?,
            one_queue: choice(
                &var,
                "ONE_QUEUE",
                &[("0", OneQueue::Off), ("1", OneQueue::InOrder), ("any", OneQueue::Any)],
            )?,
            queue_depth: number(&var, "QUEUE_DEPTH", 0)?,
            free_lock: choice(&var, "FREE_LOCK", &FLAG)?,
            poison: choice(
                &var,
                "POISON",
                &[("off", Poison::Off), ("start", Poison::Start), ("enqueue", Poison::Enqueue)],
            )?,
            peer_loss: choice(&var, "PEER_LOSS", &[("error", PeerLoss::Error), ("hang", PeerLoss::Hang)])?,
            connect: choice(&var, "CONNECT", &[("init", Connect::Init), ("call", Connect::Call)])?,
            gpudirect: choice(
                &var,
                "GPUDIRECT",
                &[
                    ("off", GpuDirect::Off),
                    ("ordered", GpuDirect::Ordered),
                    ("flush", GpuDirect::Flush),
                    ("coherent", GpuDirect::Coherent),
                ],
            )?,
            host_alias: choice(&var, "HOST_ALIAS", &FLAG)?,
            any_pointer: choice(&var, "ANY_POINTER", &FLAG)?,
            hang_limit: Duration::from_secs(number(&var, "HANG_S", 60)?),
            quiet: choice(&var, "QUIET", &FLAG)?,
        })
    }

    /// The delay of operation `seq` of stream `stream`: the same in every run with the same seed.
    pub fn delay(&self, stream: u64, seq: u64) -> Duration {
        let max = self.delay_max.as_micros() as u64;
        if max == 0 {
            return Duration::ZERO;
        }
        let mixed = mix(mix(mix(self.seed) ^ stream) ^ seq);
        Duration::from_micros(mixed % max)
    }
}

const FLAG: [(&str, bool); 2] = [("0", false), ("1", true)];

/// splitmix64's finaliser.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn number<T: FromStr>(var: &impl Fn(&str) -> Option<String>, name: &str, default: T) -> Result<T, String> {
    let Some(text) = var(name) else { return Ok(default) };
    text.trim().parse().map_err(|_| format!("SMDDP_STANDIN_{name}={text} is no number that fits"))
}

/// The first choice is the default.
fn choice<T: Copy>(
    var: &impl Fn(&str) -> Option<String>,
    name: &str,
    choices: &[(&str, T)],
) -> Result<T, String> {
    let text = var(name).unwrap_or_else(|| choices[0].0.to_string());
    choices.iter().find(|(word, _)| *word == text).map(|(_, value)| *value).ok_or_else(|| {
        let words: Vec<_> = choices.iter().map(|(word, _)| *word).collect();
        format!("SMDDP_STANDIN_{name}={text} is none of {}", words.join(", "))
    })
}

/// `function:nth:code`, or `function:nth+:code` for the nth call and all later ones.
fn fault(text: &str) -> Result<Fault, String> {
    let wrong = || format!("SMDDP_STANDIN_FAIL: {text} is not function:nth:code");
    let [function, nth, code] = text.trim().split(':').collect::<Vec<_>>()[..] else { return Err(wrong()) };
    let (nth, always) = nth.strip_suffix('+').map_or((nth, false), |nth| (nth, true));
    let nth = nth.parse().ok().filter(|nth| *nth > 0).ok_or_else(wrong)?;
    Ok(Fault { function: function.into(), nth, always, code: code.parse().map_err(|_| wrong())? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(pairs: &[(&str, &str)]) -> Result<Switches, String> {
        Switches::parse(|name| {
            let name = name.strip_prefix("SMDDP_STANDIN_").unwrap();
            pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_string())
        })
    }

    #[test]
    fn faults_are_read_and_bad_ones_named() {
        let got = with(&[("FAIL", "cuMemAlloc_v2:3:2,ncclSend:1+:6")]).unwrap();
        let expected = [
            Fault { function: "cuMemAlloc_v2".into(), nth: 3, always: false, code: 2 },
            Fault { function: "ncclSend".into(), nth: 1, always: true, code: 6 },
        ];
        assert_eq!(got.faults, expected);
        for bad in ["cuInit", "cuInit:0:1", "cuInit:x:1", "cuInit:1:x", ""] {
            let why = with(&[("FAIL", bad)]).unwrap_err();
            assert!(why.contains("function:nth:code"), "{bad}: {why}");
        }
    }

    #[test]
    fn a_word_unknown_is_refused() {
        assert!(with(&[("WAIT_VALUE", "maybe")]).unwrap_err().contains("works, unsupported, never"));
        assert!(with(&[("DEVICES", "many")]).unwrap_err().contains("DEVICES=many"));
        assert_eq!(with(&[("POISON", "start")]).unwrap().poison, Poison::Start);
    }

    #[test]
    fn delays_repeat_with_the_seed_and_differ_without() {
        let delays = |seed: &str| {
            let switches = with(&[("SEED", seed), ("DELAY_US", "1000")]).unwrap();
            (0..64).map(|seq| switches.delay(7, seq)).collect::<Vec<_>>()
        };
        assert_eq!(delays("1"), delays("1"));
        assert_ne!(delays("1"), delays("2"));
        assert!(delays("1").iter().all(|delay| *delay < Duration::from_millis(1)));
    }
}
