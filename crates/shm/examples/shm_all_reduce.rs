//! Times all_reduce on this node, two processes by default, without the engine: phases straight on the transport.
//!
//! ```sh
//! cargo run --release -p smddp-shm --example shm_all_reduce -- [ranks] [slot bytes] [slots] [chunk bytes] [from] [to]
//! ```
//!
//! `direct` is one phase in which everybody reads everybody; `sharded` cuts the buffer into chunks, each a reduce-scatter
//! and an all-gather, several in flight. Times are microseconds: the fastest batch, and the median batch in brackets.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use smddp_core::call::{Call, Collective, PackedCall};
use smddp_core::dtype::{DType, ReduceOp};
use smddp_core::plan::{Move, Op, Plan, Span, Who};
use smddp_core::transport::{Arith, Buffers, Ctx, NodeLocal, PhaseRun};
use smddp_core::{Error, Region, Result};
use smddp_shm::{Geometry, Listener, Membership, ShmNode};

const SIZES: [usize; 15] = [
    4,
    32,
    256,
    1 << 10,
    4 << 10,
    16 << 10,
    32 << 10,
    64 << 10,
    128 << 10,
    256 << 10,
    1 << 20,
    4 << 20,
    16 << 20,
    64 << 20,
    256 << 20,
];

fn main() -> Result<()> {
    let arguments: Vec<usize> = std::env::args()
        .skip(1)
        .map(|a| smddp_core::settings::parse_bytes(&a).map_or(0, |n| n as usize))
        .collect();
    let given = |at: usize, default| arguments.get(at).copied().unwrap_or(default);
    let (size, slot, slots, chunk) = (given(0, 2), given(1, 512 << 10), given(2, 4), given(3, 0));
    let geometry = Geometry { slot, slots };
    let range = given(4, 0)..=given(5, usize::MAX);
    let sizes: Vec<usize> = SIZES.into_iter().filter(|s| range.contains(s)).collect();
    match std::env::var("SHM_EXAMPLE_RANK") {
        Ok(rank) => {
            let rank = rank.parse().map_err(|_| Error::Internal("rank".to_owned()))?;
            let name = std::env::var("SHM_EXAMPLE_NAME").unwrap_or_default();
            measure(ShmNode::connect(&name, &membership(rank, size))?, rank, size, chunk, &sizes)
        }
        Err(_) => start(size, geometry, chunk, &sizes),
    }
}

fn membership(local_rank: usize, size: usize) -> Membership {
    Membership {
        group: 1,
        secret: [1; 32],
        local_rank,
        ranks: (0..size as u32).collect(),
        node: "here".to_owned(),
        single_copy: true,
        streams_from: None,
        deadline: Instant::now() + Duration::from_secs(10),
    }
}

/// Rank 0: starts the others.
fn start(size: usize, geometry: Geometry, chunk: usize, sizes: &[usize]) -> Result<()> {
    let failed = |e: std::io::Error| Error::Internal(e.to_string());
    let listener = Listener::bind()?;
    let mut children = vec![];
    for rank in 1..size {
        let child = Command::new(std::env::current_exe().map_err(failed)?)
            .args(std::env::args().skip(1))
            .env("SHM_EXAMPLE_RANK", rank.to_string())
            .env("SHM_EXAMPLE_NAME", listener.name())
            .stdout(Stdio::piped())
            .spawn();
        children.push(child.map_err(failed)?);
    }
    let node = listener.serve(&membership(0, size), geometry)?;
    println!("{size} ranks, {:?}, {} bytes shared", node.geometry(), node.shared_bytes());
    measure(node, 0, size, chunk, sizes)?;
    for child in &mut children {
        if let Some(output) = child.stdout.take() {
            for line in BufReader::new(output).lines().map_while(|l| l.ok()) {
                println!("{line}");
            }
        }
        child.wait().map_err(failed)?;
    }
    Ok(())
}

/// One way to all_reduce: phases in the order in which every rank submits them.
struct Way {
    plan: Arc<Plan>,
    tail: Arc<Plan>,
    full: usize,
    chunk: usize,
    rounds: usize,
    phases: usize,
}

fn plan(len: usize, size: usize, direct: bool) -> Arc<Plan> {
    let mut plan = Plan::default();
    let span = Span::input(0, len);
    if direct {
        plan.push(
            Op::Phase(vec![Move { from: Who::All, to: Who::All, src: span, dst: span, finish: true }]),
            &[],
        );
        return Arc::new(plan);
    }
    let share = (len / 4).div_ceil(size) * 4;
    let shards: Vec<Span> =
        (0..size).map(|l| Span::input((l * share).min(len), share.min(len - (l * share).min(len)))).collect();
    let whose = |l: usize| Who::One(l as u32);
    let scatter = shards.iter().enumerate();
    let scatter = scatter.map(|(l, &s)| Move { from: Who::All, to: whose(l), src: s, dst: s, finish: true });
    plan.push(Op::Phase(scatter.collect()), &[]);
    let gather = shards.iter().enumerate();
    let gather = gather.map(|(l, &s)| Move { from: whose(l), to: Who::All, src: s, dst: s, finish: true });
    plan.push(Op::Phase(gather.collect()), &[0]);
    Arc::new(plan)
}

impl Way {
    fn new(bytes: usize, size: usize, direct: bool, chunk: usize) -> Way {
        let chunk = if direct { bytes } else { chunk.min(bytes) };
        Way {
            plan: plan(chunk, size, direct),
            tail: plan(bytes % chunk, size, direct),
            full: bytes / chunk,
            chunk,
            rounds: bytes.div_ceil(chunk),
            phases: if direct { 1 } else { 2 },
        }
    }

    /// One call; phases interleave as a schedule with lag 1 orders them.
    fn run(&self, node: &mut ShmNode, work: &Work, done: &mut Vec<Ctx>) -> Result<()> {
        let (mut next, mut finished, mut idle) = ((0, 0), [0usize; 2], 0u32);
        while finished[self.phases - 1] < self.rounds {
            while let Some((round, phase)) = self.at(next) {
                let ready =
                    if phase == 0 { round < finished[self.phases - 1] + 3 } else { round < finished[0] };
                if !ready {
                    break;
                }
                let plan = if round < self.full { &self.plan } else { &self.tail };
                node.submit(PhaseRun {
                    plan: Arc::clone(plan),
                    step: phase as u32,
                    shift: round * self.chunk,
                    buffers: work.buffers,
                    arith: work.arith,
                    call: work.call,
                    ctx: Ctx(phase as u64),
                })?;
                next = self.after(next);
            }
            idle = if node.poll(done)? { 0 } else { idle + 1 };
            match idle {
                n if n < work.spins => std::hint::spin_loop(),
                n if n < work.spins + 100 => std::thread::yield_now(),
                _ => sleep(node, done)?,
            }
            for ctx in done.drain(..) {
                finished[ctx.0 as usize] += 1;
            }
        }
        Ok(())
    }

    /// Place (c, i) in the order is phase i of round c - i.
    fn at(&self, (place, phase): (usize, usize)) -> Option<(usize, usize)> {
        (place < self.rounds + self.phases - 1).then(|| (place - phase, phase))
    }

    fn after(&self, (place, phase): (usize, usize)) -> (usize, usize) {
        let mut next = if phase + 1 < self.phases { (place, phase + 1) } else { (place + 1, 0) };
        // Skip places before the first and behind the last round.
        while next.0 < self.rounds + self.phases - 1 && (next.1 > next.0 || next.0 - next.1 >= self.rounds) {
            next = if next.1 + 1 < self.phases { (next.0, next.1 + 1) } else { (next.0 + 1, 0) };
        }
        next
    }
}

/// Until a peer rings.
fn sleep(node: &mut ShmNode, done: &mut Vec<Ctx>) -> Result<()> {
    let bell = node.bell();
    node.arm();
    let value = bell.value();
    if !node.poll(done)? {
        bell.wait(value, Duration::from_millis(50));
    }
    node.disarm();
    Ok(())
}

struct Work {
    buffers: Buffers,
    arith: Arith,
    call: PackedCall,
    /// Polls before yielding: none where ranks outnumber cores.
    spins: u32,
}

fn measure(mut node: ShmNode, rank: usize, size: usize, chunk: usize, sizes: &[usize]) -> Result<()> {
    let mut values = vec![0f32; sizes.iter().max().map_or(0, |most| most / 4)];
    if rank == 0 {
        println!("{:>10}  {:>22}  {:>22}", "bytes", "direct", "sharded");
    }
    for &bytes in sizes {
        let mut columns = vec![];
        for direct in [true, false] {
            let chunk = if chunk > 0 { chunk } else { node.geometry().slot * size };
            let way = Way::new(bytes, size, direct, chunk);
            if (direct && bytes > 4 << 20) || (!direct && bytes < 1024) {
                columns.push("-".to_owned());
                continue;
            }
            columns.push(batches(&mut node, &way, &mut values[..bytes / 4], rank, size)?);
        }
        if rank == 0 {
            println!("{bytes:>10}  {:>22}  {:>22}", columns[0], columns[1]);
        }
    }
    Ok(())
}

/// Fastest and median batch.
fn batches(node: &mut ShmNode, way: &Way, values: &mut [f32], rank: usize, size: usize) -> Result<String> {
    let bytes = size_of_val(values);
    values.fill(1.0 + rank as f32);
    // SAFETY: the values outlive every call, and nobody else uses them meanwhile.
    let region = unsafe { Region::of(values) };
    let work = Work {
        buffers: Buffers { input: region, output: region, scratch: Region::EMPTY },
        arith: Arith { dtype: DType::F32, op: ReduceOp::Avg, world: size as u32 },
        call: Call::new(Collective::AllReduce, DType::F32, (bytes / 4) as u64).pack(),
        spins: std::thread::available_parallelism()
            .map_or(0, |cores| if cores.get() < size { 0 } else { 2000 }),
    };
    let mut done = Vec::with_capacity(16);
    let calls = (40_000_000 / (bytes + 8_000)).clamp(3, 2000);
    way.run(node, &work, &mut done)?;
    let expected = (1..=size).sum::<usize>() as f32 / size as f32;
    if values.iter().any(|&v| v != expected) {
        return Err(Error::Internal(format!("wrong result at {bytes} bytes")));
    }
    let mut times: Vec<f64> = (0..15)
        .map(|_| {
            let started = Instant::now();
            for _ in 0..calls {
                way.run(node, &work, &mut done)?;
            }
            Ok(started.elapsed().as_secs_f64() * 1e6 / calls as f64)
        })
        .collect::<Result<_>>()?;
    times.sort_by(f64::total_cmp);
    Ok(format!("{:.2} ({:.2})", times[0], times[7]))
}
