//! Tests in processes of their own: switches, counts and a broken context belong to a whole process, and
//! ranks are processes.

use crate::build::paths;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const CHILD: &str = "SMDDP_STANDIN_CHILD";
const FOLDER: &str = "SMDDP_STANDIN_FOLDER";

/// One test that runs as several ranks.
pub struct Children {
    test: String,
    ranks: usize,
    env: Vec<(String, String)>,
    limit: Duration,
    /// Ranks that are expected to die before the end.
    dying: Vec<usize>,
}

/// The process that runs as a rank.
pub struct Rank {
    pub rank: usize,
    pub ranks: usize,
    folder: PathBuf,
}

impl Children {
    /// For the test function that calls this; `test` is its path within the test binary, as `cargo test`
    /// prints it.
    pub fn of(test: &str) -> Self {
        Self {
            test: test.into(),
            ranks: 1,
            env: Vec::new(),
            limit: Duration::from_secs(120),
            dying: Vec::new(),
        }
    }

    #[must_use]
    pub fn ranks(mut self, ranks: usize) -> Self {
        self.ranks = ranks;
        self
    }

    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// This rank kills itself: how it ends does not matter.
    #[must_use]
    pub fn dies(mut self, rank: usize) -> Self {
        self.dying.push(rank);
        self
    }

    /// Runs `body` as every rank.
    ///
    /// # Panics
    /// If a rank fails, does not run the body to its end, or takes longer than the limit; or, in a rank, if
    /// `body` does.
    pub fn run(self, body: impl FnOnce(&Rank)) {
        if let Some(rank) = Rank::of_this_process(&self.test) {
            body(&rank);
            rank.publish(&format!("end-{}", rank.rank), b"");
            return;
        }
        let folder = Folder::new();
        let running = Running((0..self.ranks).map(|rank| self.spawn(rank, &folder.0)).collect());
        let failures = running.wait(self.limit);
        for (rank, failure) in failures.into_iter().enumerate() {
            if self.dying.contains(&rank) {
                continue;
            }
            assert_eq!(failure, None, "rank {rank} of {}", self.test);
            let ended = folder.0.join(format!("end-{rank}")).exists();
            assert!(ended, "rank {rank} never ran {}: is that the test's name?", self.test);
        }
    }

    fn spawn(&self, rank: usize, folder: &Path) -> Child {
        let this = std::env::current_exe().expect("a test knows its binary");
        Command::new(this)
            .args([&self.test, "--exact", "--nocapture", "--include-ignored"])
            .env(CHILD, format!("{} {rank} {}", self.test, self.ranks))
            .env(FOLDER, folder)
            .envs(paths().env())
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            // The test runner's own report; panics go to stderr.
            .stdout(Stdio::null())
            .spawn()
            .expect("a test can start its own binary")
    }
}

/// Children that do not outlive their test.
struct Running(Vec<Child>);

impl Running {
    /// For each child why it failed, if it did. All are over afterwards.
    fn wait(mut self, limit: Duration) -> Vec<Option<String>> {
        let start = Instant::now();
        let mut failures: Vec<Option<Option<String>>> = self.0.iter().map(|_| None).collect();
        while failures.iter().any(Option::is_none) {
            for (child, failure) in self.0.iter_mut().zip(&mut failures).filter(|(_, f)| f.is_none()) {
                *failure = match child.try_wait() {
                    Ok(Some(status)) => Some((!status.success()).then(|| status.to_string())),
                    Ok(None) if start.elapsed() > limit => {
                        let _ = child.kill();
                        let _ = child.wait();
                        Some(Some(format!("killed after {} s", limit.as_secs())))
                    }
                    Ok(None) => None,
                    Err(why) => Some(Some(why.to_string())),
                };
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        failures.into_iter().flatten().collect()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // Those that have ended are beyond harm.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let serial = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("smddp-standin-{}-{serial}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&folder).expect("the temporary folder can be written");
        Self(folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Rank {
    fn of_this_process(test: &str) -> Option<Self> {
        let text = std::env::var(CHILD).ok()?;
        let mut words = text.split(' ');
        let mine = words.next() == Some(test);
        let mut number = || words.next().and_then(|word| word.parse().ok());
        let (rank, ranks) = (number()?, number()?);
        mine.then(|| Self { rank, ranks, folder: std::env::var_os(FOLDER).unwrap_or_default().into() })
    }

    /// Gives `bytes` to the other ranks under a name.
    pub fn publish(&self, name: &str, bytes: &[u8]) {
        let part = self.folder.join(format!(".{name}-{}", self.rank));
        std::fs::write(&part, bytes).expect("the test's folder can be written");
        std::fs::rename(&part, self.folder.join(name)).expect("the test's folder can be written");
    }

    /// What some rank published under that name, once it has.
    ///
    /// # Panics
    /// If nobody does in a minute.
    pub fn receive(&self, name: &str) -> Vec<u8> {
        let start = Instant::now();
        loop {
            if let Ok(bytes) = std::fs::read(self.folder.join(name)) {
                return bytes;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "rank {} got no {name}", self.rank);
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until all ranks are here.
    pub fn barrier(&self, name: &str) {
        self.publish(&format!("{name}-{}", self.rank), b"");
        for rank in 0..self.ranks {
            self.receive(&format!("{name}-{rank}"));
        }
    }
}
