//! Time to make a schedule and its graphs: what the first call of a shape pays, before the cache has it.
//!
//! `cargo bench -p smddp-core --bench plans`

use divan::Bencher;
use smddp_core::engine::graph::Ready;
use smddp_core::plan::{CallShape, Tuning, schedule};
use smddp_core::{Collective, GroupShape};

fn main() {
    divan::main();
}

/// Of 1 MiB of float32 a rank.
struct Case {
    collective: Collective,
    nodes: usize,
    each: usize,
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}x{}", self.collective, self.nodes, self.each)
    }
}

fn cases() -> Vec<Case> {
    let collectives = [Collective::AllReduce, Collective::AllGather, Collective::AllToAll];
    let groups = [(1, 2), (1, 8), (2, 8), (16, 8), (64, 8)];
    let with = |collective| groups.map(|(nodes, each)| Case { collective, nodes, each });
    collectives.into_iter().flat_map(with).collect()
}

#[divan::bench(args = cases())]
fn schedules(bencher: Bencher<'_, '_>, case: &Case) {
    let shape = GroupShape::uneven(&vec![case.each; case.nodes]);
    let call = CallShape::new(case.collective, 4, 256 << 10);
    let tuning = Tuning::default();
    bencher.bench(|| schedule(&shape, 0, &call, &tuning).map(|made| Ready::new(made, false)));
}
