require 'json'
require_relative '../../../lib/community/app_handler'

# What supernode-agent promises beyond that.
describe 'supernode-agent' do
    include_context('vm_handler')

    def ssh(command)
        @info[:vm].ssh(command)
    end

    def main_pid
        output_of('systemctl show -p MainPID --value flower-supernode.service')
    end

    def output_of(command)
        ssh(command).stdout.to_s.strip
    end

    # The first test to run waits for the others as well.
    before(:all) do
        limit = Time.now + 600
        sleep 5 until @info[:vm].ssh('supernode-agent status --ready').success? || Time.now > limit
    end

    it 'says that the node is ready' do
        ssh('supernode-agent status --ready').expect_success
        ssh('/opt/flower/scripts/health-check.sh').expect_success
    end

    it 'has read the parameters of the appliance' do
        arguments = JSON.parse(output_of("docker inspect -f '{{json .Args}}' flower-supernode"))
        expect(arguments.join(' ')).to include(APP_CONTEXT_PARAMS[:FL_SUPERLINK_ADDRESS])
    end

    it 'warns of no GPU where none was asked for' do
        expect(output_of('journalctl -b -u flower-supernode -p warning -o cat')).not_to include('No usable GPU')
    end

    it 'finds configuration, Docker and image as they should be' do
        checks = JSON.parse(output_of('supernode-agent check vm --json'))['checks']
        ours = checks.select { |check| %w[settings configuration docker image].include?(check['id']) }
        expect(ours.reject { |check| check['level'] == 'OK' }).to eq([])
    end

    it 'gives the container no privileges' do
        host = JSON.parse(output_of("docker inspect -f '{{json .HostConfig}}' flower-supernode"))
        expect(host['Privileged']).to be(false)
        expect(host['CapDrop']).to include('ALL')
    end

    it 'boots without an ordering cycle' do
        expect(output_of("journalctl -b -o cat | grep -c 'ordering cycle'")).to eq('0')
    end

    it 'leaves the container alone when the agent is killed' do
        container = output_of("docker inspect -f '{{.Id}} {{.State.StartedAt}}' flower-supernode")
        agent = main_pid
        ssh('systemctl kill --kill-whom=main --signal=KILL flower-supernode.service').expect_success
        limit = Time.now + 120
        sleep 5 until [agent, '0'].none?(main_pid) || Time.now > limit
        expect(main_pid).not_to eq(agent)
        expect(output_of("docker inspect -f '{{.Id}} {{.State.StartedAt}}' flower-supernode")).to eq(container)
    end

    it 'stops the container with the unit, and starts it again' do
        ssh('systemctl stop flower-supernode.service').expect_success
        expect(output_of("docker inspect -f '{{.State.Running}}' flower-supernode")).not_to eq('true')
        ssh('systemctl start flower-supernode.service').expect_success
        ssh('supernode-agent status --ready').expect_success
    end
end
