//! Every algorithm of every collective over real shared memory and real libfabric, in many small rounds.

use std::fmt::Debug;

use half::bf16;
use smddp::{Collective, Element, GroupShape, ReduceOp, World};
use smddp_core::plan::candidates;

use crate::{figure, good_job};

trait Number: Element + Copy + PartialEq + Debug {
    /// How far a sum of five may be off, as a part of the sum of what is added up.
    const PRECISION: f64;

    fn of(value: f32) -> Self;
    fn value(self) -> f64;
    fn bits(self) -> u32;
}

impl Number for f32 {
    const PRECISION: f64 = 1e-6;

    fn of(value: f32) -> f32 {
        value
    }

    fn value(self) -> f64 {
        f64::from(self)
    }

    fn bits(self) -> u32 {
        self.to_bits()
    }
}

impl Number for bf16 {
    const PRECISION: f64 = 0.02;

    fn of(value: f32) -> bf16 {
        bf16::from_f32(value)
    }

    fn value(self) -> f64 {
        f64::from(self)
    }

    fn bits(self) -> u32 {
        u32::from(self.to_bits())
    }
}

/// Small whole numbers, whose sums are exact in 16 bits whatever their order.
fn whole<T: Number>(rank: usize, i: usize) -> T {
    T::of((i * 7 % 11 + rank) as f32)
}

/// Numbers whose sum depends on the order, known on every rank.
fn fraction<T: Number>(rank: usize, i: usize) -> T {
    let seed = (i as u64) << 8 | rank as u64;
    let mixed = (seed + 1).wrapping_mul(6364136223846793005);
    T::of(((mixed ^ mixed >> 29).wrapping_mul(0xbf58476d1ce4e5b9) >> 40) as f32 / 1e6 - 8.0)
}

fn list<T: Number>(count: usize, value: impl Fn(usize) -> T) -> Vec<T> {
    (0..count).map(value).collect()
}

/// A number of what all ranks must hold bit by bit.
struct Hash(u64);

impl Hash {
    fn add<T: Number>(&mut self, values: &[T]) {
        for value in values {
            self.0 = (self.0 ^ u64::from(value.bits())).wrapping_mul(0x100000001b3);
        }
    }
}

pub fn rank() {
    let world = World::init().unwrap();
    let mut hash = Hash(0xcbf29ce484222325);
    for count in [1, 333, 6000] {
        every_collective::<f32>(&world, count, &mut hash);
        every_collective::<bf16>(&world, count, &mut hash);
    }
    world.barrier().unwrap();
    check_name(&world, Collective::Barrier);
    println!("hash={}", hash.0);
}

/// That the call was done as SMDDP_ALGORITHM has it.
fn check_name(world: &World, collective: Collective) {
    let asked = std::env::var("SMDDP_ALGORITHM").unwrap();
    let of = |entry: &&str| entry.split_once('=').unwrap().0 == collective.name();
    let algorithm = asked.split(',').find(of).unwrap().split_once('=').unwrap().1;
    let inner = world.last_algorithm();
    let inner = inner.strip_prefix("hierarchical(").map_or(&*inner, |rest| rest.trim_end_matches(')'));
    assert_eq!(inner, algorithm, "{collective}");
}

fn every_collective<T: Number>(world: &World, count: usize, hash: &mut Hash) {
    let (n, me) = (world.size(), world.rank());
    let root = count % n;
    let sum = |i: usize| T::of((0..n).map(|r| whole::<T>(r, i).value() as f32).sum());

    let mut data = list(count, |i| whole::<T>(me, i));
    world.all_reduce(&mut data, ReduceOp::Sum).unwrap();
    check_name(world, Collective::AllReduce);
    assert_eq!(data, list(count, sum), "all_reduce");

    // The same bits everywhere, whatever was added up first.
    let mut data = list(count, |i| fraction::<T>(me, i));
    world.all_reduce(&mut data, ReduceOp::Sum).unwrap();
    hash.add(&data);
    for (i, got) in data.iter().enumerate() {
        let parts = || (0..n).map(|r| fraction::<T>(r, i).value());
        let limit = T::PRECISION * parts().map(f64::abs).sum::<f64>();
        assert!((got.value() - parts().sum::<f64>()).abs() <= limit, "all_reduce, element {i}: {got:?}");
    }

    let input = list(n * count, |i| whole::<T>(me, i));
    let mut own = vec![T::of(-1.0); count];
    world.reduce_scatter(&input, &mut own, ReduceOp::Sum).unwrap();
    check_name(world, Collective::ReduceScatter);
    assert_eq!(own, list(count, |i| sum(me * count + i)), "reduce_scatter");

    let mut all = vec![T::of(-1.0); n * count];
    world.all_gather(&own, &mut all).unwrap();
    check_name(world, Collective::AllGather);
    assert_eq!(all, list(n * count, sum), "all_gather");
    hash.add(&all);

    all.fill(T::of(-1.0));
    world.all_to_all(&input, &mut all).unwrap();
    check_name(world, Collective::AllToAll);
    assert_eq!(all, list(n * count, |k| whole::<T>(k / count, me * count + k % count)), "all_to_all");

    let mut data = list(count, |i| fraction::<T>(me, i));
    world.broadcast(&mut data, root).unwrap();
    check_name(world, Collective::Broadcast);
    assert_eq!(data, list(count, |i| fraction::<T>(root, i)), "broadcast");
    hash.add(&data);

    let mut data = list(count, |i| whole::<T>(me, i));
    world.reduce(&mut data, root, ReduceOp::Sum).unwrap();
    check_name(world, Collective::Reduce);
    assert_eq!(data, list(count, |i| if me == root { sum(i) } else { whole(me, i) }), "reduce");

    let own = list(count, |i| whole::<T>(me, i));
    let mut at_root = vec![T::of(-1.0); if me == root { n * count } else { 0 }];
    world.gather(&own, (me == root).then_some(&mut at_root[..]), root).unwrap();
    check_name(world, Collective::Gather);
    assert_eq!(at_root, list(at_root.len(), |k| whole::<T>(k / count, k % count)), "gather");

    let parts = list(if me == root { n * count } else { 0 }, |k| whole::<T>(k / count + 1, k % count));
    let mut own = own;
    world.scatter((me == root).then_some(&parts[..]), &mut own, root).unwrap();
    check_name(world, Collective::Scatter);
    assert_eq!(own, list(count, |i| whole::<T>(me + 1, i)), "scatter");
}

#[test]
fn every_algorithm_gives_the_result_and_the_same_bits_on_all_ranks() {
    for nodes in [&[2usize, 2, 1][..], &[1; 5]] {
        let count = GroupShape::uneven(nodes).node_count();
        let known = Collective::PLANNED.map(|c| (c, candidates(c, count).collect::<Vec<_>>()));
        let most = known.iter().map(|(_, names)| names.len()).max().unwrap();
        for turn in 0..most {
            let entry = |(c, names): &(Collective, Vec<&str>)| format!("{c}={}", names[turn % names.len()]);
            let asked = known.iter().map(entry).collect::<Vec<_>>().join(",");
            // Several rounds, and messages that ask first as well as those that do not.
            let settings = [("SMDDP_ALGORITHM", &*asked), ("SMDDP_CHUNK", "2K"), ("SMDDP_EAGER", "512")];
            let outputs = good_job("algorithms", nodes, &settings);
            let hashes: Vec<u64> = outputs.iter().map(|o| figure(o, "hash")).collect();
            assert!(hashes.iter().all(|h| *h == hashes[0]), "{asked} on {nodes:?}: {hashes:?}");
        }
    }
}
