//! All-reduces gradients over every rank: `mpirun -n 4 target/release/examples/all_reduce`, or alone.

fn main() -> smddp::Result<()> {
    let world = smddp::World::init()?;
    let mut gradients = vec![(world.rank() + 1) as f32; 1 << 20];
    world.all_reduce(&mut gradients, smddp::ReduceOp::Sum)?;
    let expected = (world.size() * (world.size() + 1) / 2) as f32;
    assert!(gradients.iter().all(|&g| g == expected));
    println!("rank {} of {}: {expected} by {}", world.rank(), world.size(), world.last_algorithm());
    Ok(())
}
