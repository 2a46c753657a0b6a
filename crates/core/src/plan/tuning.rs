//! What a person may change about schedules: sizes, and which algorithm serves a call.

use super::algorithms::algorithms;
use crate::call::Collective;
use crate::error::{Error, Result};
use crate::settings::{Settings, parse_bytes};

/// What a person or a machine may change about schedules; equal on all ranks of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// Bytes of a round; 0: chosen by size and shape.
    pub chunk: usize,
    /// Bytes of a rank's staging memory. A schedule uses at most one of [`Tuning::SHARES`] shares of it.
    pub staging: usize,
    /// All-reduce data reaches the fabric through scratch alone, since the user's buffers are not host memory.
    pub staged: bool,
    /// All-reduce data of up to so many bytes goes through one rank a node: fewer messages matter more than their size.
    pub one_owner: usize,
    pub overrides: Vec<Override>,
}

impl Default for Tuning {
    fn default() -> Self {
        Tuning { chunk: 0, staging: 16 << 20, staged: false, one_owner: 8 << 10, overrides: Vec::new() }
    }
}

impl Tuning {
    /// Calls that can have their scratch at once.
    pub const SHARES: usize = 4;

    pub fn from_settings(settings: &Settings) -> Result<Tuning> {
        Ok(Tuning {
            chunk: settings.number("SMDDP_CHUNK"),
            staging: settings.number("SMDDP_STAGING"),
            overrides: Override::parse_all(settings.text("SMDDP_ALGORITHM"))?,
            ..Tuning::default()
        })
    }

    /// Bytes that all rounds in flight of one schedule may use together.
    pub const fn scratch(&self) -> usize {
        self.staging / Tuning::SHARES
    }
}

/// One entry of SMDDP_ALGORITHM: `collective[:from-to]=algorithm`, bytes as [`CallShape::bytes`](super::CallShape::bytes) counts them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Override {
    pub collective: Collective,
    pub from: usize,
    pub to: usize,
    pub algorithm: &'static str,
}

impl Override {
    /// Entries are separated by commas; the first that fits a call counts.
    pub fn parse_all(text: &str) -> Result<Vec<Override>> {
        Override::parse_for("SMDDP_ALGORITHM", text, algorithms)
    }

    /// As [`parse_all`](Self::parse_all), of the setting `name`, whose algorithms of a collective are `known`.
    pub fn parse_for(name: &str, text: &str, known: Known) -> Result<Vec<Override>> {
        let entries = text.split(',').map(str::trim).filter(|t| !t.is_empty());
        entries.map(|entry| Override::parse(name, entry, known)).collect()
    }

    /// Whether the entry is for calls of `collective` with so many bytes.
    pub fn fits(&self, collective: Collective, bytes: usize) -> bool {
        self.collective == collective && (self.from..=self.to).contains(&bytes)
    }

    fn parse(name: &str, text: &str, known: Known) -> Result<Override> {
        let wrong = |expected: String| Error::Setting {
            name: name.to_owned(),
            given: text.to_owned(),
            expected,
            hint: "Write collective=algorithm or collective:64K-1M=algorithm, separated by commas".to_owned(),
        };
        let (what, algorithm) = text.split_once('=').ok_or_else(|| wrong("expected a '='".to_owned()))?;
        let (collective, range) = what.split_once(':').unwrap_or((what, "-"));
        let is_known = |&c: &Collective| !known(c).is_empty();
        let unknown = || {
            let all = Collective::ALL.into_iter().filter(is_known).map(Collective::name);
            wrong(format!("'{collective}' is no collective; known: {}", all.collect::<Vec<_>>().join(", ")))
        };
        let collective = Collective::from_name(collective.trim()).filter(is_known).ok_or_else(unknown)?;
        let bound = |t: &str, default: usize| match t.trim() {
            "" => Some(default),
            t => parse_bytes(t).map(|b| b as usize),
        };
        let limits = range.split_once('-').and_then(|(a, b)| Some((bound(a, 0)?, bound(b, usize::MAX)?)));
        let (from, to) =
            limits.ok_or_else(|| wrong(format!("'{range}' is no range of bytes such as 64K-1M or 64K-")))?;
        if from > to {
            return Err(wrong(format!("'{range}' ends before it begins")));
        }
        let names = known(collective);
        let algorithm = names.iter().find(|n| **n == algorithm.trim()).ok_or_else(|| {
            wrong(format!("'{algorithm}' is no algorithm of {collective}; known: {}", names.join(", ")))
        })?;
        Ok(Override { collective, from, to, algorithm })
    }
}

/// The algorithms of a collective; none: it is not to be overridden.
pub type Known = fn(Collective) -> &'static [&'static str];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_of_schedules_are_obeyed() {
        let pairs = [("SMDDP_CHUNK", "20K"), ("SMDDP_STAGING", "3M"), ("SMDDP_ALGORITHM", "broadcast=tree")];
        let given = pairs.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let tuning = Tuning::from_settings(&Settings::from_vars(given).unwrap()).unwrap();
        let overrides = Override::parse_all(pairs[2].1).unwrap();
        assert_eq!(tuning, Tuning { chunk: 20 << 10, staging: 3 << 20, overrides, ..Tuning::default() });
        let usual = Tuning::from_settings(&Settings::from_vars([]).unwrap()).unwrap();
        assert_eq!(usual, Tuning::default());
    }

    #[test]
    fn overrides_are_read_and_refused() {
        let list = Override::parse_all("all_reduce:64K-=sharded, broadcast=tree").unwrap();
        assert_eq!(list[0].from, 64 << 10);
        assert_eq!(list[1].algorithm, "tree");
        for (text, named) in [
            ("all_reduce=magic", "halving_doubling"),
            ("all_produce=ring", "all_reduce"),
            ("all_reduce:x-=ring", "range"),
            ("all_reduce:1M-64K=ring", "ends before it begins"),
            ("ring", "'='"),
        ] {
            let error = Override::parse_all(text).unwrap_err().to_string();
            assert!(error.contains(named) && error.contains("SMDDP_ALGORITHM"), "{error}");
        }
    }
}
