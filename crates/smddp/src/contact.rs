//! What ranks tell each other while a group is made. JSON: read once per group, and read by people when something
//! goes wrong.

use serde::{Deserialize, Serialize};
use smddp_core::settings::{Settings, parse_bytes};
use smddp_core::{Error, Result};

/// Ranks with different numbers cannot work together.
pub const PROTOCOL: u32 = 2;

/// Settings that must be equal on all ranks of a group: plans, how messages travel between nodes, and the way and the pieces of
/// calls on devices follow from them. Not those of shared memory, whose slots a node's first rank chooses for all of it.
const SHARED: [&str; 9] = [
    "SMDDP_CHUNK",
    "SMDDP_ALGORITHM",
    "SMDDP_STAGING",
    "SMDDP_EAGER",
    "SMDDP_STRIPE",
    "SMDDP_CUDA",
    "SMDDP_CUDA_ALGORITHM",
    "SMDDP_CUDA_SLOT",
    "SMDDP_CUDA_SLOTS",
];

/// Whether two values of a setting say the same: 64K is 65536.
fn alike(a: &str, b: &str) -> bool {
    a == b || parse_bytes(a).is_some_and(|number| parse_bytes(b) == Some(number))
}

/// First round: who is who.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub struct Hello {
    pub protocol: u32,
    pub version: String,
    pub size: usize,
    /// [`NodeId`](crate::node::NodeId).
    pub node: String,
    pub node_name: String,
    pub cores: Vec<usize>,
    pub settings: Vec<String>,
    /// Rank 0's are used: identity and secret of the group.
    pub id: u64,
    pub secret: [u8; 32],
}

/// Second round: how to be reached; or why this rank cannot be.
#[derive(Serialize, Deserialize, Clone, Debug, Default)]
pub struct Contact {
    /// Socket from which the node's other ranks get the shared segment; from the node's first rank.
    pub socket: Option<String>,
    pub fabric: Option<Vec<u8>>,
    pub error: Option<String>,
}

/// Last round: ready, or why not.
#[derive(Serialize, Deserialize, Clone, Debug, Default)]
pub struct Outcome {
    pub error: Option<String>,
}

pub fn shared_settings(settings: &Settings) -> Vec<String> {
    SHARED.iter().map(|name| settings.text(name).to_owned()).collect()
}

pub fn to_bytes<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    serde_json::to_vec(value)
        .map_err(|e| Error::Internal(format!("writing a message of group creation: {e}")))
}

/// Everybody's messages, by rank.
pub fn from_bytes<T: for<'a> Deserialize<'a>>(group: &str, all: &[Vec<u8>]) -> Result<Vec<T>> {
    let read = |(rank, bytes): (usize, &Vec<u8>)| {
        serde_json::from_slice(bytes).map_err(|e| Error::Bootstrap {
            what: format!("rank {rank} of group '{group}' sent something unreadable: {e}"),
            hint: "Install the same version of smdistributed_rs on every node".to_owned(),
        })
    };
    all.iter().enumerate().map(read).collect()
}

/// Checks that all ranks can work together with this one.
pub fn check(group: &str, me: usize, hellos: &[Hello]) -> Result<()> {
    let ours = &hellos[me];
    for (rank, theirs) in hellos.iter().enumerate() {
        if theirs.protocol != ours.protocol {
            return Err(Error::Bootstrap {
                what: format!(
                    "rank {rank} of group '{group}' runs version {} (protocol {}), rank {me} runs {} (protocol {})",
                    theirs.version, theirs.protocol, ours.version, ours.protocol
                ),
                hint: "Install the same version of smdistributed_rs on every node".to_owned(),
            });
        }
        if theirs.size != ours.size {
            return Err(Error::Bootstrap {
                what: format!(
                    "ranks disagree on the size of group '{group}': rank {rank} says {}, rank {me} says {}",
                    theirs.size, ours.size
                ),
                hint: "Start every rank with the same WORLD_SIZE".to_owned(),
            });
        }
        for (name, (a, b)) in SHARED.iter().zip(ours.settings.iter().zip(&theirs.settings)) {
            if !alike(a, b) {
                return Err(Error::Setting {
                    name: (*name).to_owned(),
                    given: a.clone(),
                    expected: format!("rank {rank} of group '{group}' has {b}"),
                    hint: "Give every rank the same value (mpirun -x NAME passes it on)".to_owned(),
                });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello() -> Hello {
        Hello {
            protocol: PROTOCOL,
            version: "1".to_owned(),
            size: 2,
            node: "n".to_owned(),
            node_name: "n".to_owned(),
            cores: vec![0],
            settings: shared_settings(&Settings::default()),
            id: 1,
            secret: [0; 32],
        }
    }

    fn with(name: &str, value: &str) -> Hello {
        let mut settings = Settings::default();
        settings.set(name, value).unwrap();
        Hello { settings: shared_settings(&settings), ..hello() }
    }

    #[test]
    fn every_disagreement_is_named() {
        assert_eq!(check("g", 0, &[hello(), hello()]), Ok(()));
        let text = |other: Hello| check("g", 0, &[hello(), other]).unwrap_err().to_string();
        assert!(text(Hello { protocol: 9, ..hello() }).contains("protocol 9"));
        assert!(text(Hello { size: 3, ..hello() }).contains("rank 1 says 3, rank 0 says 2"));
        for (at, name) in SHARED.into_iter().enumerate() {
            let mut odd = hello();
            odd.settings[at] = "odd".to_owned();
            let said = text(odd);
            assert!(said.contains(name) && said.contains("rank 1") && said.contains("odd"), "{said}");
        }
    }

    #[test]
    fn a_number_may_be_written_in_several_ways() {
        let pair = |a, b| check("g", 0, &[with("SMDDP_CHUNK", a), with("SMDDP_CHUNK", b)]);
        assert_eq!(pair("64K", "65536"), Ok(()));
        assert!(pair("64K", "64M").is_err());
    }

    #[test]
    fn garbage_is_an_error_that_names_the_rank() {
        let all = vec![to_bytes(&hello()).unwrap(), b"{".to_vec()];
        let said = from_bytes::<Hello>("g", &all).unwrap_err().to_string();
        assert!(said.contains("rank 1"), "{said}");
    }

    #[test]
    fn the_page_of_settings_names_those_that_must_be_equal() {
        let page = include_str!("../../../docs/settings.md");
        let introduction = page.split("\n| ").next().unwrap();
        for name in SHARED {
            assert!(introduction.contains(&format!("`{name}`")), "{name}");
        }
    }
}
