//! Ranks that die in the midst of a call, at any moment of it, and those that are left.

use std::time::{Duration, Instant};

use smddp::{Collective, Error, ReduceOp, World};

use crate::job;

/// Survivors that hear of a death later than this have waited for a limit (60 s in these jobs), or nearly.
const SOON: Duration = Duration::from_secs(15);

fn number(name: &str) -> usize {
    std::env::var(name).unwrap().parse().unwrap()
}

/// Any generator will do.
fn mix(seed: usize) -> u64 {
    let mixed = (seed as u64 + 1).wrapping_mul(0x9e3779b97f4a7c15);
    (mixed ^ mixed >> 31).wrapping_mul(0xbf58476d1ce4e5b9) >> 33
}

pub fn rank() {
    let world = World::init().unwrap();
    let (n, me) = (world.size(), world.rank());
    let (victim, count, seed) = (number("JOB_VICTIM"), number("JOB_BYTES") / 4, number("JOB_SEED"));
    let collective = Collective::from_name(&std::env::var("JOB_COLLECTIVE").unwrap()).unwrap();
    let (mut own, mut all) = (vec![1f32; count], vec![1f32; n * count]);
    let mut other = all.clone();
    world.barrier().unwrap();
    let started = Instant::now();
    if me == victim {
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_micros(mix(seed) % 20_000));
            std::process::abort();
        });
    }
    let error = loop {
        let result = match collective {
            Collective::AllReduce => world.all_reduce(&mut own, ReduceOp::Max),
            Collective::ReduceScatter => world.reduce_scatter(&all, &mut own, ReduceOp::Max),
            Collective::AllGather => world.all_gather(&own, &mut all),
            Collective::AllToAll => world.all_to_all(&all, &mut other),
            Collective::Broadcast => world.broadcast(&mut own, 0),
            Collective::Reduce => world.reduce(&mut own, 0, ReduceOp::Max),
            Collective::Gather => world.gather(&own, (me == 0).then_some(&mut all[..]), 0),
            Collective::Scatter => world.scatter((me == 0).then_some(&all[..]), &mut own, 0),
            _ => world.barrier(),
        };
        if let Err(error) = result {
            break error;
        }
    };
    let after = started.elapsed();
    assert!(matches!(error, Error::PeerLost { .. } | Error::Aborted { .. }), "{error}");
    assert!(error.to_string().contains(&format!("rank {victim}")), "rank {victim} is not named: {error}");
    assert!(after < SOON, "heard after {after:?}: {error}");
}

/// Each case once: a job a case.
fn die_in_every_collective(nodes: &[usize], salt: usize) {
    let size: usize = nodes.iter().sum();
    for (c, collective) in Collective::PLANNED.into_iter().enumerate() {
        for (s, bytes) in ["64", "1048576"].into_iter().enumerate() {
            if collective == Collective::Barrier && s > 0 {
                continue;
            }
            let seed = salt + 2 * c + s;
            let victim = mix(seed) as usize % size;
            let settings = [
                ("SMDDP_SHM_SINGLE_COPY", "on"),
                ("JOB_COLLECTIVE", collective.name()),
                ("JOB_BYTES", bytes),
                ("JOB_SEED", &seed.to_string()),
                ("JOB_VICTIM", &victim.to_string()),
            ];
            for end in job("dies", nodes, &settings) {
                let expected = if end.rank == victim { None } else { Some(0) };
                assert_eq!(
                    end.code, expected,
                    "rank {} when rank {victim} died in {collective} of {bytes} bytes on {nodes:?}, seed {seed}:\n{}",
                    end.rank, end.output
                );
            }
        }
    }
}

#[test]
fn a_death_in_the_midst_of_a_call_is_told_within_a_node() {
    die_in_every_collective(&[3], 0);
}

#[test]
fn a_death_in_the_midst_of_a_call_is_told_between_nodes() {
    die_in_every_collective(&[1, 1, 1], 100);
}
